"""Options that messages name: each exists in every command that can print the message."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.options import options_of

import litgpt_akl
from litgpt_akl.cli.main import COMMANDS

PACKAGE = Path(litgpt_akl.__file__).parent
OPTION = re.compile(r"(?<![\w-])--([a-z][\w-]*(?:\.\w+)*(?:\.(?=\0))?)")
"""With a point at the end if a name is filled in there."""
OTHERS = {"shm-size": "Docker's", "long": "zstd's", "faint": "a variable of CSS"}


ELSEWHERE = {
    ("evaluate_akl", "litgpt_akl.models.gpt.is_tied"): "it is asked without a wish",
    ("export_hf", "litgpt_akl.models.gpt.is_tied"): "it is asked without a wish",
    ("evaluate_akl", "litgpt_akl.loss.objective.UserFunction"): "the divergence is one of the package's own",
    ("evaluate_akl", "litgpt_akl.training.launch.WAY_ON"): "it gives words of its own",
    ("finetune_akl", "litgpt_akl.training.summary.next_commands"): "they stand behind evaluate_akl",
    ("generate_responses", "litgpt_akl.models.gpt.is_tied"): "it is asked without a wish",
    ("generate_responses", "litgpt_akl.config.args.GenerationArgs"): "the same is checked by the command's own names",
    ("generate_responses", "litgpt_akl.training.launch.WAY_ON"): "it gives words of its own",
    ("evaluate_akl", "litgpt_akl.data.preparation._describe_missing"): "it says that training with it is meant",
    ("generate_responses", "litgpt_akl.data.preparation._describe_missing"): "it says that training with it is meant",
    ("make_student", "litgpt_akl.commands.make_student._tell"): "it says how to train the student",
    ("make_student", "litgpt_akl.data.preparation._describe_missing"): "it says that training with it is meant",
    ("make_student", "litgpt_akl.loss.objective.UserFunction"): "the divergence is one of the package's own",
    ("make_student", "litgpt_akl.models.gpt.is_tied"): "it is asked without a wish",
    ("export_prompts", "litgpt_akl.data.preparation._describe_missing"): "it says that training with it is meant",
    ("export_prompts", "litgpt_akl.teacher.cache.TeacherCache"): "a cache that may be written is mended",
    ("export_prompts", "litgpt_akl.teacher.cache_identity.check_identity"): "a cache that is not there is begun",
    ("import_hidden_states", "litgpt_akl.data.preparation._describe_missing"): "it says that training with it is meant",
    ("import_hidden_states", "litgpt_akl.teacher.cache.TeacherCache"): "a cache that may be written is mended",
    ("import_hidden_states", "litgpt_akl.teacher.cache_identity.check_identity"): "a cache that is not there is begun",
    ("import_hidden_states", "litgpt_akl.commands.import_hidden_states._tell"): "it says how to train with the cache",
    ("generate_responses", "litgpt_akl.models.weights.OPTIONS"): "its role is another one",
    ("make_student", "litgpt_akl.models.weights.OPTIONS"): "its role is another one",
    ("export_hf", "litgpt_akl.models.weights.OPTIONS"): "its role is another one",
    ("export_hf", "litgpt_akl.models.chat_template.ChatTemplate"): "no template is chosen",
    ("report_akl", "litgpt_akl.config.old_names.new_name"): "it names what a run's recipe holds",
    ("report_akl", "litgpt_akl.config.old_names.two_values"): "it names what a run's recipe holds",
    ("report_akl", "litgpt_akl.report.history.read_history"): "it says that finetune_akl's option is meant",
    ("report_akl", "litgpt_akl.report.page._objective"): "it shows with what options a run was made",
}
"""Options of other commands that are never told as if they were the command's own, and why."""


TYPES = ("annotation", "returns")
DEFAULTS = ("defaults", "kw_defaults")


class Definition(NamedTuple):
    """A function or a class of a module of this package, or one of its constants."""

    module: str
    name: str


SETUP = Definition("litgpt_akl.commands.finetune_akl", "setup")
OF_SETUP = {
    Definition("litgpt_akl.config.distillation", "DistillArgs"),
    Definition("litgpt_akl.config.args", "TeacherArgs"),
}
WRAPPED = {"make_student": {SETUP, *OF_SETUP}}
"""What a command calls with options that a user has not given: errors from there are told with a way out of its own."""


@functools.cache
def definitions(module: str) -> tuple[dict[str, ast.AST], dict[str, Definition]]:
    """What stands at the top of a module, and what it imports from the package, by their names in it."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    tree = ast.parse(
        (path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py").read_text()
    )
    own, imported = {}, {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            own |= {name.id: node for name in ast.walk(node) if isinstance(name, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("litgpt_akl"):
            imported |= {of.asname or of.name: Definition(node.module, of.name) for of in node.names}
    return own, imported


def walk(node: ast.AST, skipped: tuple[str, ...] = TYPES):
    """All nodes but those of documentation and of the fields to be skipped."""
    yield node
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and name not in skipped and not is_text:
                yield from walk(child, skipped)


def uses(definition: Definition) -> set[Definition]:
    """What of the package a definition's code names."""
    own, imported = definitions(definition.module)
    found = set()
    for node in walk(own[definition.name]):
        if isinstance(node, ast.Name):
            if node.id in own:
                found.add(Definition(definition.module, node.id))
            elif node.id in imported:
                found.add(imported[node.id])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            place = imported[node.value.id]
            found.add(Definition(f"{place.module}.{place.name}", node.attr))
    return {place for place in found if exists(place)}


def exists(place: Definition) -> bool:
    path = PACKAGE.joinpath(*place.module.split(".")[1:])
    known = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    return known and place.name in definitions(place.module)[0]


def reached(command: str) -> set[Definition]:
    """All that a command may run, and more: whatever is named by what it names."""
    module, name = COMMANDS[command].split(":")
    found, waiting = set(), {Definition(module, name)}
    while waiting:
        definition = waiting.pop()
        found.add(definition)
        waiting |= uses(definition) - found - WRAPPED.get(command, set())
    return found


def named_options(definition: Definition) -> set[str]:
    """In its texts; not in parameters' defaults, in whose place a command gives its own option."""
    texts = [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for node in walk(definitions(definition.module)[0][definition.name], (*TYPES, *DEFAULTS))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    return {option for text in texts for option in OPTION.findall(text)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_a_message_names_is_one_of_the_command_that_prints_it(command):
    wrong = [
        f"{place.module}.{place.name}: --{option}"
        for place in reached(command)
        for option in named_options(place)
        if option not in options_of(command) and option not in OTHERS
        if (command, f"{place.module}.{place.name}") not in ELSEWHERE
    ]
    assert sorted(wrong) == []


def test_the_walk_finds_what_it_is_made_for():
    """Options of a command's own, of modules that two commands share, and of groups whose member is filled in."""
    found = {command: {option for place in reached(command) for option in named_options(place)} for command in COMMANDS}
    assert {"train.max_tokens", "resume", "data.mask_prompt", "distill."} <= found["finetune_akl"]
    assert {"max_seq_length", "generation.seeds", "data.micro_batch_tokens"} <= found["evaluate_akl"]
    assert "out" in found["report_akl"]
    for command in ("finetune_akl", "evaluate_akl"):
        assert Definition("litgpt_akl.data.litgpt_modules", "_flaw") in reached(command)
    assert Definition("litgpt_akl.teacher.cache", "TeacherCache") not in reached("evaluate_akl")
