"""README and docs/ say what is so: links lead somewhere, options and recipes exist, commands can be parsed."""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
from helpers.options import options_of
from jsonargparse import ActionConfigFile
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.scripts.download import download_from_hub

import litgpt_akl
from litgpt_akl.cli.main import COMMANDS
from litgpt_akl.cli.parser import Parser

ROOT = Path(litgpt_akl.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 130
OF_LITGPT = {"download": download_from_hub, "evaluate": convert_and_evaluate}
"""LitGPT's own commands whose options are named."""
OF_EVERY_COMMAND = {"config", "help", "print_config"}
OF_OTHERS = ("pip", "srun")
"""Programs whose options are not looked at."""
OPTION = re.compile(r"(?<![\w-])--([A-Za-z][\w.-]*)")
OF_ARGPARSE = re.compile(r'add_argument\(\s*"--(\w+)"')
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def code_of(text: str) -> Iterator[str]:
    """Each command of the code blocks, joined where it goes on, and each piece of code within a line."""
    for _, block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", without_fences(text))


def words_of(code: str) -> list[str]:
    """The words of a command, without variables before it and comments behind it."""
    words = shlex.split(code, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


def commands_of(text: str) -> Iterator[list[str]]:
    """Whole command lines of this package, such as could be run as they stand."""
    names = "|".join(COMMANDS)
    for language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if language == "bash" and re.match(f"litgpt ({names}) ", line):
                yield words_of(line)[1:]


def anchors(page: Path) -> set[str]:
    """What a link can name on a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def scripts_of(text: str) -> set[Path]:
    """The scripts that a page calls."""
    scripts = {ROOT / name for name in re.findall(r"(?:python|bash) (scripts/[\w/]+\.(?:py|sh))", text)}
    return scripts | {
        ROOT / "tests" / f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (helpers\.\w+)", text)
    }


def known_options(words: list[str], text: str) -> set[str]:
    """The options that a piece of code may name; for one without a program those of anything that its page calls."""
    if words[0] in ("litgpt", "litgpt-akl"):
        if words[1] in COMMANDS:
            return options_of(words[1]) | OF_EVERY_COMMAND
        return set(inspect.signature(OF_LITGPT[words[1]]).parameters)
    scripts = scripts_of(" ".join(words)) or scripts_of(text)
    of_scripts = {name for script in scripts for name in OF_ARGPARSE.findall(read(script))}
    if words[0] == "python":
        return of_scripts
    return of_scripts.union(OF_EVERY_COMMAND, *map(options_of, COMMANDS))


@each_page
def test_every_option_exists(page):
    text = read(page)
    for code in filter(OPTION.search, code_of(text)):
        words = words_of(code)
        if words and words[0] not in OF_OTHERS:
            named = {name for word in words for name in OPTION.findall(word)}
            assert named <= known_options(words, text), code


def test_options_are_looked_for_where_they_stand():
    known = known_options(["litgpt", "make_student"], "")
    assert "layers" in known and "devices" not in known
    known = known_options(words_of("PYTHONPATH=tests:scripts python -m helpers.torture --kills 200"), "")
    assert {"kills", "seed"} <= known and "devices" not in known
    known = known_options(["--teacher.precision"], "`python scripts/experiments/compare_divergences.py`")
    assert {"teacher.precision", "train.", "quick"} <= known and "kills" not in known


def test_there_are_commands():
    found = [words[0] for page in PAGES for words in commands_of(read(page))]
    assert len(found) >= 7 and {"finetune_akl", "evaluate_akl"} <= set(found)


@each_page
def test_every_command_can_be_parsed(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(read(page)):
        parser = Parser(exit_on_error=False)
        parser.add_argument("--config", action=ActionConfigFile)
        parser.add_function_arguments(resolve_name(COMMANDS[words[0]]), as_positional=True)
        parser.parse_args(words[1:])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(read(page))):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_every_recipe_exists(page):
    for name in re.findall(r"configs/([\w.-]+\.yaml)", read(page)):
        assert (ROOT / "configs" / name).is_file(), name


@each_page
def test_every_script_exists(page):
    for script in scripts_of(read(page)):
        assert script.is_file(), script


def test_the_readme_is_short_and_leads_to_every_page():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= README_LINES
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_nobody_is_told_to_install_what_is_not_published():
    files = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "litgpt_akl").rglob("*.py")]
    assert [path.name for path in files if re.search(r"pip install .?litgpt-akl", read(path))] == []
