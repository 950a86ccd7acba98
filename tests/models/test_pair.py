"""What is refused before any weight is read, with which words, and that nothing is left behind."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import distil, eval_args, train_args
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config
from tokenizers import Tokenizer

from litgpt_akl.config.checks import check_training_args, choose_precision, optimizer_config
from litgpt_akl.config.distillation import AKLArgs, AlphaBetaArgs, DistillArgs, JSDArgs, MixArgs, SkewedArgs, TADArgs
from litgpt_akl.messages import UserError
from litgpt_akl.models.pair import check_pair


def altered(source: Path, target: Path, **config) -> Path:
    """A copy of a checkpoint whose model_config.yaml says something else."""
    shutil.copytree(source, target)
    path = target / "model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | config))
    return target


def edit_tokenizer(directory: Path, edit) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    edit(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer))


def swap_two(vocab) -> None:
    one, other = [token for token, id in vocab.items() if id in (500, 501)]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def test_widths_may_differ_by_padding_only(teacher_dir, student_dir, alice_json, tmp_path):
    """151,936 against 152,064 in small: both heads are wider than the tokenizer, each by another padding."""
    source = torch.load(student_dir / "lit_model.pth", weights_only=True)
    finals = []
    for width in (1024, 1088):
        directory = altered(student_dir, tmp_path / f"student-{width}", padded_vocab_size=width)
        weights = dict(source)
        for name in ("lm_head.weight", "transformer.wte.weight"):
            padding = torch.full((width - 1024, weights[name].size(1)), 5.0)
            weights[name] = torch.cat([weights[name], padding])
        torch.save(weights, directory / "lit_model.pth")
        assert check_pair(directory, teacher_dir).vocab_size == 1024
        finals.append(distil(directory, teacher_dir, alice_json, tmp_path / f"out-{width}"))
    for name, weight in finals[0].items():
        torch.testing.assert_close(finals[1][name], weight, rtol=0, atol=1e-6)
    # whoever reads the student draws from all rows
    assert finals[1]["lm_head.weight"].shape == (1024, 64)


def test_special_tokens_lie_inside_the_computed_range(teacher_dir, student_dir, tmp_path):
    # as in Qwen2.5, whose vocab_size lies below the id of <|im_end|>: added tokens count
    pair = check_pair(altered(student_dir, tmp_path / "student", vocab_size=1000), teacher_dir)
    assert pair.vocab_size == 1024 and pair.tokenizer.eos_id < pair.vocab_size
    narrow = altered(student_dir, tmp_path / "narrow", padded_vocab_size=1023)
    with pytest.raises(UserError, match=r"student's LM head has 1,023 ids, but its tokenizer has 1,024"):
        check_pair(narrow, teacher_dir)


def test_tokenizers_that_differ(teacher_dir, student_dir, tmp_path):
    same_size = altered(student_dir, tmp_path / "same-size")
    edit_tokenizer(same_size, swap_two)
    with pytest.raises(UserError, match=r"The tokenizers differ in 2 ids: id 500 is '.+' for the student"):
        check_pair(same_size, teacher_dir)
    more = altered(student_dir, tmp_path / "more")
    edit_tokenizer(more, lambda vocab: vocab.update({"another": 1024}))
    with pytest.raises(UserError, match=r"differ in 1 ids: id 1024 is 'another' for the student and None for"):
        check_pair(more, teacher_dir)
    # each has ids of its own, if they need not be the same
    pair = check_pair(same_size, teacher_dir, other_tokenizer=True)
    assert (pair.vocab_size, pair.teacher_vocab_size, pair.notes) == (1024, 1024, ())
    with pytest.raises(UserError, match=r"student's LM head has 1,024 ids, but its tokenizer has 1,025"):
        check_pair(more, teacher_dir, other_tokenizer=True)
    (more / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"more/tokenizer.json \(1 bytes\) cannot be read as a tokenizer"):
        check_pair(more, teacher_dir)


def add_tokens(directory: Path, *tokens: str) -> None:
    processor = Tokenizer.from_file(str(directory / "tokenizer.json"))
    processor.add_tokens([*tokens])
    processor.save(str(directory / "tokenizer.json"))


def test_added_tokens_may_differ_in_one_family(teacher_dir, student_dir, tmp_path):
    assert check_pair(student_dir, teacher_dir).notes == ()
    more = altered(student_dir, tmp_path / "more", padded_vocab_size=1088, vocab_size=1088)
    add_tokens(more, "<think>", "</think>")
    pair = check_pair(more, teacher_dir)
    assert pair.vocab_size == 1024
    assert "differ in 2 added tokens: id 1024 is '<think>' for the student and None for the teacher" in pair.notes[0]
    assert "Ids from 1,024 on, which only one of the models knows, are not distilled" in pair.notes[1]
    assert check_pair(teacher_dir, more).vocab_size == 1024
    # as Gemma 3 1B, whose tokenizer has a mark for pictures that the model has no row for
    narrow = altered(student_dir, tmp_path / "narrow")
    add_tokens(narrow, "<picture>")
    pair = check_pair(narrow, narrow)
    assert pair.vocab_size == 1024 and any("has no embedding of '<picture>', id 1024" in note for note in pair.notes)
    # the same id under another name
    renamed = altered(student_dir, tmp_path / "renamed")
    text = (renamed / "tokenizer.json").read_text()
    first = json.loads(text)["added_tokens"][0]["content"]
    (renamed / "tokenizer.json").write_text(text.replace(json.dumps(first), '"<other>"'))
    config = (renamed / "tokenizer_config.json").read_text()
    (renamed / "tokenizer_config.json").write_text(config.replace(json.dumps(first), '"<other>"'))
    assert "1 added tokens: id" in check_pair(renamed, teacher_dir).notes[0]


def test_other_ends_and_templates_are_told(teacher_dir, student_dir, tmp_path):
    base = altered(student_dir, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    ends = [token["content"] for token in json.loads((base / "tokenizer.json").read_text())["added_tokens"]]
    other = next(end for end in ends if end != config["eos_token"])
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": other}))
    chatty = shutil.copytree(teacher_dir, tmp_path / "chatty")
    (chatty / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ended, templated = check_pair(base, chatty).notes
    assert f"The student ends texts with {other!r}, the teacher with {config['eos_token']!r}" in ended
    assert "The student has no chat template, unlike the teacher" in templated
    assert "As the data's chat_template, `teacher` takes the teacher's for both" in templated


def test_directories(teacher_dir, student_dir, tmp_path):
    with pytest.raises(UserError, match="The teacher's checkpoint directory .*absent does not exist"):
        check_pair(student_dir, tmp_path / "absent")
    with pytest.raises(UserError, match="The student's checkpoint directory org/name does not exist"):
        check_pair(Path("org/name"), teacher_dir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="lacks lit_model.pth, model_config.yaml, tokenizer_config.json"):
        check_pair(tmp_path / "empty", teacher_dir)
    broken = altered(student_dir, tmp_path / "broken")
    (broken / "model_config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"model_config.yaml \(4 bytes\) cannot be read as YAML"):
        check_pair(broken, teacher_dir)


def refused(message: str, student, teacher, data, out_dir, **changes) -> None:
    with pytest.raises(UserError, match=message) as caught:
        distil(student, teacher, data, out_dir, **changes)
    assert len(str(caught.value).splitlines()) <= 2
    assert not list(out_dir.rglob("*.pth")) and not (out_dir / "hyperparameters.yaml").exists()


def test_runs_that_cannot_be(teacher_dir, student_dir, alice_json, tmp_path):
    out_dir = tmp_path / "out"
    short = altered(teacher_dir, tmp_path / "short", block_size=100)
    refused(r"has 1\d\d tokens; the pair reads 100", student_dir, short, alice_json, out_dir)
    message = r"max_seq_length 101 is more than the 100 tokens that the teacher reads"
    refused(message, student_dir, short, alice_json, out_dir, train={"max_seq_length": 101})
    refused("precision 16-mixed is not supported", student_dir, teacher_dir, alice_json, out_dir, precision="16-mixed")
    refused("several nodes with several", student_dir, teacher_dir, alice_json, out_dir, hybrid_sharding=True)
    refused("min_lr 0.1 is above", student_dir, teacher_dir, alice_json, out_dir, train={"min_lr": 0.1})
    expected = "--optimizer AdamWW cannot be made: torch.optim has no class AdamWW; did you mean AdamW"
    refused(expected, student_dir, teacher_dir, alice_json, out_dir, optimizer="AdamWW")
    refused("needs a package", student_dir, teacher_dir, alice_json, out_dir, logger_name="litlogger")
    (tmp_path / "file").write_text("")
    refused("cannot be made", student_dir, teacher_dir, alice_json, tmp_path / "file" / "out")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_do_not_fit(teacher_dir, student_dir, alice_json, tmp_path, role):
    good = {"student": student_dir, "teacher": teacher_dir}
    directories = good | {role: altered(good[role], tmp_path / "bad")}
    path = directories[role] / "lit_model.pth"
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], r"bytes\) cannot be read as weights: truncated"),
        (b"", r"\(0 bytes\) cannot be read as weights"),
    ):
        path.write_bytes(content)
        refused(message, directories["student"], directories["teacher"], alice_json, tmp_path / "out")
    weights = torch.load(good[role] / "lit_model.pth", weights_only=True)
    for change, message in (
        ({"optimizer": {"lr": torch.ones(1)}}, "lacks"),
        ({**weights, "lm_head.weight": torch.ones(3, 3)}, r"lm_head.weight has shape \(3, 3\)"),
        ({name: weight for name, weight in weights.items() if "h.1.attn" not in name}, "lacks 2 of"),
        ({**weights, "transformer.h.0.attn.qkv.lora_A": torch.ones(1)}, "holds LoRA weights"),
    ):
        torch.save(change, path)
        refused(message, directories["student"], directories["teacher"], alice_json, tmp_path / "out")
    torch.save({"model": weights}, path)
    distil(directories["student"], directories["teacher"], alice_json, tmp_path / "wrapped")


@pytest.mark.skipif(os.name != "posix", reason="needs file permissions")
def test_a_directory_that_cannot_be_written(teacher_dir, student_dir, tmp_path, alice_json):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        # root may write anywhere, save into what is no directory
        locked = tmp_path / "file"
        locked.write_text("")
    with pytest.raises(UserError, match="--out_dir .* (is not writable|cannot be made)"):
        distil(student_dir, teacher_dir, alice_json, locked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"akl": AKLArgs(mu=1.5)}, "--distill.akl.mu must be above 0 and at most 1, got 1.5"),
        ({"kd_ratio": -0.1}, "--distill.kd_ratio must be between 0 and 1, got -0.1"),
        ({"temperature": 0.0}, "--distill.temperature must be above 0, got 0.0"),
        (
            {"divergence": "kl"},
            "--distill.divergence must be one of akl, fkl, rkl, mix, .*, or the import path of a function, got 'kl'",
        ),
        ({"mix": MixArgs(ratio=0.3)}, "--distill.mix.ratio 0.3 has no effect with --distill.divergence akl"),
        (
            {"skewed": SkewedArgs(skew=0.3)},
            "--distill.skewed.skew 0.3 has no effect with .* akl. Use .*divergence skewed_fkl or skewed_rkl, or",
        ),
        ({"divergence": "fkl", "jsd": JSDArgs(beta=0.3)}, "--distill.jsd.beta 0.3 has no effect with .*divergence fkl"),
        (
            {"divergence": "jsd", "alpha_beta": AlphaBetaArgs(beta=0.3)},
            "--distill.alpha_beta.beta 0.3 has no effect with .*divergence jsd. Use .*divergence alpha_beta, or",
        ),
        (
            {"divergence": "tad", "alpha_beta": AlphaBetaArgs(alpha=0.3)},
            "--distill.alpha_beta.alpha 0.3 has no effect with --distill.divergence tad",
        ),
        ({"divergence": "tv", "tad": TADArgs(top_k=3)}, "--distill.tad.top_k 3 has no effect with .*divergence tv"),
        (
            {"tad": TADArgs(tail_weight=2.0)},
            "--distill.tad.tail_weight 2.0 has no effect with .* Use --distill.divergence tad, or leave",
        ),
        (
            {"divergence": "jsd", "jsd": JSDArgs(beta=1.5)},
            "--distill.jsd.beta must be between 0 and 1 for jsd, got 1.5",
        ),
        (
            {"divergence": "alpha_beta", "alpha_beta": AlphaBetaArgs(beta=0.0)},
            "--distill.alpha_beta.beta must be above 0, except .*, got 0.0",
        ),
        ({"divergence": "mix", "mix": MixArgs(ratio=1.5)}, "--distill.mix.ratio must be between 0 and 1, got 1.5"),
        ({"divergence": "skewed_rkl", "skewed": SkewedArgs(skew=1.0)}, "--distill.skewed.skew must be .*, got 1.0"),
        ({"block_tokens": 0}, "--distill.block_tokens must be at least 1, got 0"),
    ],
)
def test_distillation_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        DistillArgs(**options)


@pytest.mark.parametrize(
    ("train", "eval", "message"),
    [
        ({"max_tokens": 10}, {}, "--train.max_tokens 10 is not supported"),
        ({"epochs": None, "max_steps": None}, {}, "both null"),
        ({"micro_batch_size": 0}, {}, "--train.micro_batch_size must be at least 1, got 0"),
        ({"save_interval": 0}, {}, "--train.save_interval must be at least 1, got 0"),
        ({"max_norm": 0.0}, {}, "--train.max_norm must be above 0, got 0.0"),
        ({"max_time": -1.0}, {}, "--train.max_time must be above 0"),
        ({"min_lr": -1.0}, {}, "--train.min_lr must not be negative"),
        ({}, {"interval": 0}, "--eval.interval must be at least 1, got 0"),
        ({}, {"evaluate_example": -1}, "--eval.evaluate_example must be first, random"),
        ({}, {"evaluate_example": "last"}, "--eval.evaluate_example must be first, random"),
    ],
)
def test_training_options_that_cannot_be_meant(train, eval, message):
    with pytest.raises(UserError, match=message):
        check_training_args(train_args(**train), eval_args(**eval))


def test_every_field_of_litgpts_arguments_is_known_here():
    """A field that a later LitGPT adds must be honoured or refused, not ignored."""
    assert {field.name for field in fields(TrainArgs)} == {
        *("save_interval", "log_interval", "global_batch_size", "micro_batch_size", "lr_warmup_steps"),
        *("lr_warmup_fraction", "epochs", "max_tokens", "max_steps", "max_time", "max_seq_length", "tie_embeddings"),
        *("max_norm", "min_lr"),
    }
    assert {field.name for field in fields(EvalArgs)} == {
        *("interval", "max_new_tokens", "max_iters", "initial_validation", "final_validation", "evaluate_example")
    }


def test_precision_and_optimizer_options():
    assert choose_precision(None, cuda=False) == "32-true" and choose_precision(None, cuda=True) == "bf16-mixed"
    assert optimizer_config("AdamW") == "AdamW"
    assert optimizer_config({"class_path": "AdamW", "lr": "1e-4", "betas": "[0.9, 0.95]"}) == {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 1e-4, "betas": [0.9, 0.95]},
    }
    # of the class that a run has by default
    assert optimizer_config({"lr": "0.1"}) == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    assert optimizer_config({"class_path": "torch.optim.SGD"}) == optimizer_config({"class_path": "SGD"}) == "SGD"


def test_the_real_command_says_it_in_one_line(teacher_dir, student_dir, alice_json, tmp_path):
    """Exit status and output as a user sees them; what the messages say is tested above."""
    command = [Path(sys.executable).with_name("litgpt"), "finetune_akl", str(tmp_path / "absent")]
    data = ["--data", "JSON", "--data.json_path", str(alice_json), "--out_dir", str(tmp_path / "out")]
    result = subprocess.run(
        [*command, "--teacher_checkpoint_dir", str(teacher_dir), *data], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"error: The student's checkpoint directory {tmp_path / 'absent'} does not exist.",
        "Give a LitGPT checkpoint directory, or a model id from `litgpt download list`, as checkpoint_dir.",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["Gemma-2-2b", "pythia-14m", "Qwen2.5-0.5B"])
def test_architectures(teacher_dir, alice_json, tmp_path, architecture):
    """Softcaps, biases, other norms, other blocks: each a small model that trains beside the same teacher."""
    small = dict(n_layer=2, n_embd=32, n_head=4, intermediate_size=64, block_size=128, padded_vocab_size=1024)
    groups = {} if architecture == "pythia-14m" else {"n_query_groups": 2, "head_size": 8}
    directory = altered(teacher_dir, tmp_path / "student")
    config = Config.from_name(architecture, **small, **groups)
    if config.sliding_window_indices is not None:
        config.sliding_window_indices = config.sliding_window_indices[:2]
    torch.manual_seed(0)
    model = GPT(config)
    model.apply(model._init_weights)
    save_config(config, directory)
    torch.save(model.state_dict(), directory / "lit_model.pth")
    (directory / "config.json").unlink()
    final = distil(directory, teacher_dir, alice_json, tmp_path / "out", train={"max_steps": 2})
    exported = GPT(Config.from_file(tmp_path / "out" / "final" / "model_config.yaml"))
    exported.load_state_dict(final)
    assert exported.config.final_logit_softcapping == config.final_logit_softcapping
    assert not torch.equal(final["lm_head.weight"], model.lm_head.weight)
