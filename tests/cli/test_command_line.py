"""Command lines and configuration files as people write them: what arrives at the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.options import MODELS, arguments_of, make_parser
from helpers.runs import distil

from litgpt_akl.cli.parser import Parser
from litgpt_akl.config.distillation import AlphaBetaArgs, JSDArgs, SkewedArgs, TADArgs
from litgpt_akl.config.old_names import OLD_NAMES
from litgpt_akl.config.recipe import differences, recipe_as_yaml
from litgpt_akl.files.manifest import MANIFEST, read_manifest, write_manifest
from litgpt_akl.messages import UserError

FILES = {
    "adamw.yaml": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "betas": [0.9, 0.95]}}},
    "flat.yaml": {"optimizer": {"class_path": "torch.optim.AdamW", "lr": 1e-4, "betas": [0.9, 0.95]}},
    "name.yaml": {"optimizer": "SGD"},
    "rate.yaml": {"optimizer": {"lr": 1e-4}},
    "old.yaml": {"distill": {"divergence": "jsd", "mu": 0.4, "head_rule": "official", "beta": 0.3}},
    "new.yaml": {"distill": {"divergence": "jsd", "akl": {"mu": 0.4, "head_rule": "official"}, "jsd": {"beta": 0.3}}},
    "both.yaml": {"distill": {"mu": 0.4, "akl": {"mu": 0.3}}},
    "same.yaml": {"distill": {"mu": 0.4, "akl": {"mu": 0.4}}},
    "open.yaml": {"distill": {"beta": 0.4}},
}
ADAMW, SGD = "torch.optim.AdamW", "torch.optim.SGD"

OPTIMIZERS = {
    "": "AdamW",
    "--optimizer.lr 1e-3": (ADAMW, {"lr": 1e-3}),
    "--optimizer.lr=1e-3 --optimizer.weight_decay 0.1": (ADAMW, {"lr": 1e-3, "weight_decay": 0.1}),
    "--optimizer AdamW --optimizer.lr 1e-3": (ADAMW, {"lr": 1e-3}),
    "--optimizer.lr 1e-3 --optimizer AdamW": (ADAMW, {"lr": 1e-3}),
    "--optimizer=SGD --optimizer.lr 1e-3": (SGD, {"lr": 1e-3}),
    "--optimizer.momentum 0.9 --optimizer SGD --optimizer.lr 0.1": (SGD, {"momentum": 0.9, "lr": 0.1}),
    "--optimizer.momentum 0.9 --seed 3 --optimizer=SGD": (SGD, {"momentum": 0.9}),
    "--optimizer.class_path SGD --optimizer.init_args.lr 0.1": (SGD, {"lr": 0.1}),
    "--optimizer SGD --optimizer RMSprop --optimizer.lr 0.1": ("torch.optim.RMSprop", {"lr": 0.1}),
    '--optimizer.lr 1e-3 --optimizer {"class_path":"SGD","init_args":{"momentum":0.9}}': (
        SGD,
        {"momentum": 0.9, "lr": 1e-3},
    ),
    "--config adamw.yaml": (ADAMW, {"lr": 1e-4, "betas": [0.9, 0.95]}),
    "--config flat.yaml": (ADAMW, {"lr": 1e-4, "betas": [0.9, 0.95]}),
    "--config name.yaml": "SGD",
    "--config rate.yaml": (ADAMW, {"lr": 1e-4}),
    # an option keeps what a file says of the others, a class begins anew
    "--config adamw.yaml --optimizer.lr 1e-3": (ADAMW, {"lr": 1e-3, "betas": [0.9, 0.95]}),
    "--config=flat.yaml --optimizer.lr 1e-3": (ADAMW, {"lr": 1e-3, "betas": [0.9, 0.95]}),
    "--config adamw.yaml --optimizer.init_args.lr 1e-3": (ADAMW, {"lr": 1e-3, "betas": [0.9, 0.95]}),
    "--config name.yaml --optimizer.momentum 0.9": (SGD, {"momentum": 0.9}),
    "--config rate.yaml --optimizer.eps 1e-6": (ADAMW, {"lr": 1e-4, "eps": 1e-6}),
    "--config adamw.yaml --optimizer SGD": "SGD",
    "--config adamw.yaml --optimizer.class_path SGD": "SGD",
    "--config adamw.yaml --optimizer.momentum 0.9 --optimizer SGD": (SGD, {"momentum": 0.9}),
    "--config adamw.yaml --optimizer SGD --optimizer.momentum 0.9": (SGD, {"momentum": 0.9}),
    '--config adamw.yaml --optimizer {"class_path":"SGD","init_args":{"lr":0.1}}': (SGD, {"lr": 0.1}),
    "--config adamw.yaml --optimizer AdamW --optimizer.lr 1e-3": (ADAMW, {"lr": 1e-3}),
    "--config adamw.yaml --config name.yaml": "SGD",
    "--optimizer SGD --config name.yaml --optimizer.momentum 0.9": (SGD, {"momentum": 0.9}),
}


@pytest.fixture(scope="module")
def parser() -> Parser:
    return make_parser()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (directory / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return directory


@pytest.mark.parametrize("line", OPTIMIZERS)
def test_an_optimizer_and_its_options(parser, files, monkeypatch, line):
    monkeypatch.chdir(files)
    optimizer, expected = arguments_of(parser, [*MODELS, *line.split()])["optimizer"], OPTIMIZERS[line]
    if isinstance(expected, tuple):
        expected = {"class_path": expected[0], "init_args": expected[1]}
    assert optimizer == expected


def test_an_optimizer_needs_a_value(parser, capsys):
    for line in ("--optimizer", "--optimizer --seed 3"):
        with pytest.raises(SystemExit):
            arguments_of(parser, [*MODELS, *line.split()])
        assert capsys.readouterr().err == "error: --optimizer: expected one argument\n"


NOW = {
    "--distill.mu 0.4": ("akl", "mu", 0.4),
    "--distill.head_rule=official": ("akl", "head_rule", "official"),
    "--distill.divergence mix --distill.mix_ratio 0.3": ("mix", "ratio", 0.3),
    "--distill.beta 0.3 --distill.divergence=jsd": ("jsd", "beta", 0.3),
    "--distill.divergence alpha_beta --distill.beta=0.3": ("alpha_beta", "beta", 0.3),
    "--distill.divergence alpha_beta --distill.alpha 0.3": ("alpha_beta", "alpha", 0.3),
    "--distill.divergence skewed_rkl --distill.skew 0.3": ("skewed", "skew", 0.3),
    "--distill.divergence tad --distill.top_k 3": ("tad", "top_k", 3),
    "--distill.divergence tad --distill.tail_weight 0.3": ("tad", "tail_weight", 0.3),
}


@pytest.mark.parametrize("line", NOW)
def test_an_old_name_goes_on_and_says_the_new_one(parser, capsys, line):
    group, name, value = NOW[line]
    distill = arguments_of(parser, [*MODELS, *line.split()])["distill"]
    assert getattr(getattr(distill, group), name) == value
    said = capsys.readouterr().err
    assert f"is now --distill.{group}.{name}" in said and said.count("\n") == 1
    new = [*MODELS, f"--distill.{group}.{name}={value}", "--distill.divergence", distill.divergence]
    assert arguments_of(parser, new)["distill"] == distill
    assert capsys.readouterr().err == ""


def test_every_old_name_is_tried():
    assert {f"{group}.{name}" for group, name, _ in NOW.values()} == {new for of in OLD_NAMES.values() for new in of}


def test_old_names_in_a_file(parser, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    old, new = (arguments_of(parser, [*MODELS, "--config", f"{name}.yaml"])["distill"] for name in ("old", "new"))
    assert old == new and old.jsd.beta == 0.3
    said = capsys.readouterr().err
    assert (
        said.startswith("--distill.mu is now --distill.akl.mu, --distill.head_rule is now ") and said.count("\n") == 1
    )
    # the command line decides, under either name
    for name in ("mu", "akl.mu"):
        words = [*MODELS, "--config", "old.yaml", f"--distill.{name}", "0.2"]
        assert arguments_of(parser, words)["distill"].akl.mu == 0.2
    assert arguments_of(parser, [*MODELS, "--config", "same.yaml"])["distill"].akl.mu == 0.4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--distill.mu 0.4 --distill.akl.mu 0.3", "--distill.mu 0.4 and --distill.akl.mu 0.3 are one option"),
        ("--config both.yaml", "--distill.mu 0.4 and --distill.akl.mu 0.3 are one option"),
        ("--distill.beta 0.3", "--distill.jsd.beta or --distill.alpha_beta.beta, and --distill.divergence is not"),
        ("--distill.beta 0.3 --distill.divergence fkl", "--distill.divergence fkl takes neither"),
        ("--config open.yaml", "--distill.jsd.beta or --distill.alpha_beta.beta"),
    ],
)
def test_two_names_with_two_values(parser, files, capsys, monkeypatch, line, message):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit):
        arguments_of(parser, [*MODELS, *line.split()])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 2


def test_nothing_is_taken_for_the_beginning_of_an_option(parser, capsys):
    for word in ("--teach", "--out", "--train.epoch", "--dry"):
        with pytest.raises(SystemExit):
            arguments_of(parser, [*MODELS, word, "3"])
        assert f"there is no option {word}" in capsys.readouterr().err


OLD_RECIPE = {
    "mu": 0.5, "head_rule": "paper", "mix_ratio": 0.5, "beta": None, "skew": 0.1, "alpha": 0.2, "top_k": 10,
    "tail_weight": 1.0,
}  # fmt: skip
"""What an earlier release kept of each run, beside the divergence."""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"divergence": "jsd", "beta": 0.3}, {"divergence": "jsd", "jsd": JSDArgs(0.3)}),
        ({"divergence": "jsd"}, {"divergence": "jsd"}),
        ({"divergence": "alpha_beta", "alpha": 0.3}, {"divergence": "alpha_beta", "alpha_beta": AlphaBetaArgs(0.3)}),
        ({"divergence": "skewed_fkl", "skew": 0.3}, {"divergence": "skewed_fkl", "skewed": SkewedArgs(0.3)}),
        ({"divergence": "tad", "top_k": 3}, {"divergence": "tad", "tad": TADArgs(3, weighting="constant")}),
    ],
)
def test_a_run_of_an_earlier_release_differs_in_nothing(parser, old, new):
    recipe = recipe_as_yaml(arguments_of(parser, MODELS) | {"distill": arguments_of_distill(parser, new)})
    earlier = yaml.safe_load(recipe)
    common = {name: value for name, value in earlier["distill"].items() if not isinstance(value, dict)}
    earlier["distill"] = common | OLD_RECIPE | old
    assert differences(yaml.safe_dump(earlier), recipe) == []
    earlier["distill"]["mu"] = 0.3
    assert differences(yaml.safe_dump(earlier), recipe) == ["distill.akl.mu 0.3 -> 0.5"]


@pytest.mark.parametrize(
    ("divergence", "expected"), [("akl", []), ("tad", ["distill.tad.weighting constant -> sequence"])]
)
def test_options_that_a_run_did_not_know_are_as_they_were(parser, divergence, expected):
    arguments = arguments_of(parser, MODELS) | {"distill": arguments_of_distill(parser, {"divergence": divergence})}
    recipe = recipe_as_yaml(arguments)
    earlier = yaml.safe_load(recipe)
    for group in ("csd", "drkl", "schedule"):
        del earlier["distill"][group]
    del earlier["distill"]["tad"]["weighting"]
    assert differences(yaml.safe_dump(earlier), recipe) == expected


def arguments_of_distill(parser: Parser, changes: dict[str, Any]) -> Any:
    return type(arguments_of(parser, MODELS)["distill"])(**changes)


def test_a_run_of_an_earlier_release_goes_on(student_dir, teacher_dir, short, tmp_path):
    train = {"max_steps": 4, "save_interval": 2}
    whole = distil(student_dir, teacher_dir, short, tmp_path / "run", train=train)
    step = tmp_path / "run" / "step-000002"
    for path in (step / "hyperparameters.yaml", tmp_path / "run" / "hyperparameters.yaml"):
        recipe = yaml.safe_load(path.read_text())
        common = {name: value for name, value in recipe["distill"].items() if not isinstance(value, dict)}
        path.write_text(yaml.safe_dump(recipe | {"distill": common | OLD_RECIPE}))
    manifest = read_manifest(step)
    (step / MANIFEST).unlink()
    kept = {name: value for name, value in manifest.items() if name not in ("format", "files")}
    write_manifest(step, **kept)
    again = distil(student_dir, teacher_dir, short, tmp_path / "again", train=train, resume=step)
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    with pytest.raises(UserError, match="distill.divergence akl -> fkl"):
        distil(
            student_dir,
            teacher_dir,
            short,
            tmp_path / "other",
            train=train,
            resume=step,
            distill={"divergence": "fkl"},
        )
