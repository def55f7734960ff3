"""python -m benchmarks.run [name] [options]: one benchmark, or all of them."""

import sys
from importlib import import_module

from benchmarks.measure import describe, provenance

NAMES = ("block_penalty", "latent_stats")


def main(arguments):
    name, *options = arguments or [None]
    if name is not None and name not in NAMES:
        sys.exit(f"unknown benchmark {name!r}; expected one of {', '.join(NAMES)}, or none for all")
    print(describe(provenance()))
    for chosen in NAMES if name is None else (name,):
        import_module(f"benchmarks.{chosen}").main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
