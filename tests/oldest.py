"""Prints the lower bounds of pyproject.toml that trainers depend on, as exact versions for pip."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRAS = ("train", "quantization", "trl")

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for extra in EXTRAS:
    for requirement in project["optional-dependencies"][extra]:
        if ">=" in requirement:
            print(requirement.replace(">=", "=="))
