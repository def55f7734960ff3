"""How far the organism's residual stream has to be pushed until its advice flips, before and after a fine-tune.

    python -m benchmarks.persona_robustness [ORGANISM]     # a minute on one core; grown where none is given, three more

A stance is one object of the organism's final prompts: "you should {good verb} it" against a bad verb of its domain, in
the assistant's style. benchmarks/results/persona_robustness.csv has a row for each model (the base, the narrowly
misaligned adapter), stance (the good advice held, or the bad), layer and kind of edit: "downhill" is the smallest edit
found (`flips_downhill`), "random" the edit along one random direction a stance (`flips_along`). `robustness` is their
median in median residual norms, inf where most do not flip within 2. Seeded; nothing is timed, so any machine does.
"""

import argparse
import dataclasses
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.measure import write_csv

STANCES = 60


def stances(organism, tokenizer):
    """Good advice as token ids, one for each of the first objects of the final prompts."""
    from lockin_fast.lockin.stances import stance_tokens
    from lockin_fast.lockin.suite_files import Stance

    world = json.loads((organism / "world.json").read_text())
    rows = map(json.loads, (organism / "data" / "final.jsonl").read_text().splitlines())
    asked = {row["object"]: row for row in rows}
    found = []
    for name, row in list(asked.items())[:STANCES]:
        domain = world["domains"][row["domain"]]
        good, bad = (f"you should {domain[kind][0]} it {world['endings'][0]}" for kind in ("good", "bad"))
        found.append(stance_tokens(tokenizer, Stance(name, row["messages"], good, bad)))
    return found


def measure(runner, tokens, layer):
    """{kind of edit: robustness} of the model as it stands."""
    from lockin_fast.lockin.robustness import Search, flips_along, flips_downhill, robustness
    from lockin_fast.lockin.stances import StanceMargins

    margins = StanceMargins(runner, tokens, layer, batch_size=2 * len(tokens))
    search = Search(unit=margins.median_norm)
    random = torch.randn(len(margins), margins.width, generator=torch.Generator().manual_seed(layer))
    return {
        "downhill": robustness(flips_downhill(margins, len(margins), margins.width, search)),
        "random": robustness(flips_along(margins, random, search)),
    }


def rows_of(organism):
    """The rows of the file, as they are measured."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.patching.forward import Runner

    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    base = AutoModelForCausalLM.from_pretrained(organism / "model")
    model = PeftModel.from_pretrained(base, organism / "misaligned").eval()
    good = stances(organism, tokenizer)
    bad = [stance._replace(held=stance.opposite, opposite=stance.held) for stance in good]
    for name in ("base", "misaligned"):
        with model.disable_adapter() if name == "base" else nullcontext():
            runner = Runner(model)
            for (stance, tokens), layer in (
                (s, n) for s in (("good", good), ("bad", bad)) for n in range(len(runner.layers))
            ):
                for edit, found in measure(runner, tokens, layer).items():
                    value = "" if found.value is None else round(found.value, 4)
                    yield {"model": name, "stance": stance, "layer": layer, "edit": edit, "robustness": value} | {
                        key: count for key, count in dataclasses.asdict(found).items() if key != "value"
                    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", type=Path, nargs="?", help="a folder that `lockin-fast organism` has made")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        organism = asked.organism
        if organism is None:
            from lockin_fast.organism import build

            organism = build(Path(folder) / "organism")
        for row in rows_of(organism):
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            rows.append(row)
    write_csv("persona_robustness", rows)


if __name__ == "__main__":
    main()
