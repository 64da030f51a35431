"""Prints pip constraints that hold every package of pyproject.toml at its lower bound."""

import re
import sys
import tomllib
from pathlib import Path


def lowest(project):
    "The `name==bound` of each requirement that names one; extras without duplicates."
    wanted = list(project["dependencies"])
    wanted += project["optional-dependencies"]["dev"]
    pins = {}
    for requirement in wanted:
        if found := re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement):
            pins[found[1].lower()] = found[2]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text()
    print(*lowest(tomllib.loads(text)["project"]), sep="\n")
