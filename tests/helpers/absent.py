"""Packages as if they were not installed, in a process and in those that it starts."""

import os
from collections.abc import Iterable
from pathlib import Path

CODE = """import sys
from importlib.machinery import PathFinder

ABSENT = {names!r}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = PathFinder.find_distributions(*args, **kwargs)
        return (one for one in found if (one.name or "").lower().replace("-", "_") not in ABSENT)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def environment_without(names: Iterable[str], directory: Path) -> dict[str, str]:
    """The variables of a Python that finds none of the packages; ``directory`` gets what tells it so when it starts."""
    (directory / "sitecustomize.py").write_text(CODE.format(names=frozenset(names)))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}
