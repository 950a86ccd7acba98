"""The house: imports point downwards only, and no room is too large to be read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import litgpt_akl

PACKAGE = Path(litgpt_akl.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
FLOORS = "messages files loss config models data memory teacher report training commands cli".split()
"""A floor imports from itself and from those before it."""
ENTRIES, LINES, BODY, BATCH = 14, 500, 60, 15
"""At most: in the package's directory, of a file, of a function below its docstring, and files that a batch passes."""
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, also within functions, from the package's own names on."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("litgpt_akl.") for name in names if name.startswith("litgpt_akl."))


def test_imports_point_downwards():
    upwards = [
        f"{name_of(path)} imports {name}"
        for path in FILES
        if (floor := name_of(path).split(".")[0]) in FLOORS
        for name in imports(path)
        if FLOORS.index(name.split(".")[0]) > FLOORS.index(floor)
    ]
    assert not upwards, "\n".join(upwards)
    # the walk sees what it should: lazy imports, too
    assert "training.reporting" in [name_of(path) for path in FILES]
    assert any(name.startswith("report.page") for name in imports(PACKAGE / "training" / "reporting.py"))


def test_the_top_of_the_package_is_small():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert {f"{floor}.py" if f"{floor}.py" in entries else floor for floor in FLOORS} <= entries
    assert len(entries) <= ENTRIES, sorted(entries)


def test_files_and_functions_can_be_read():
    too_long = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > LINES:
            too_long.append(f"{name_of(path)} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                if (lines := node.end_lineno - first.lineno + 1) > BODY:
                    too_long.append(f"{name_of(path)}.{node.name} has {lines} lines")
    assert not too_long, "\n".join(too_long)


def test_contributing_names_files_that_are_there():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    named = re.findall(r"`((?:litgpt_akl|tests|scripts|configs)/[\w/.-]*)`", text)
    assert len(named) > 30
    assert [name for name in named if not (PACKAGE.parent / name).exists()] == []
    way = re.search(r"## The way of a batch\n(.*?)\n## ", text, re.S)[1]
    files = dict.fromkeys(re.findall(r"`(litgpt_akl/[\w/]+\.py)`", way))
    assert 8 <= len(files) <= BATCH
