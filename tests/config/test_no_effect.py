"""Every option of the commands has an effect, or the command says that it has none beside another one."""

import json
from functools import partial
from pathlib import Path

import pytest
from helpers.cache_runs import fill
from helpers.options import options_of
from helpers.runs import distil
from litgpt.args import EvalArgs, LogArgs
from litgpt.data import LitData
from litgpt.prompts import Default

from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import GenerationArgs, LoRAArgs, TeacherArgs
from litgpt_akl.config.distillation import (
    TAKERS,
    AlphaBetaArgs,
    CSDArgs,
    DistillArgs,
    DRKLArgs,
    JSDArgs,
    MixArgs,
    ScheduleArgs,
    SkewedArgs,
    TADArgs,
)
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.messages import UserError

NOWHERE = Path("nowhere")
CACHE = {"cache_dir": "cache"}

REFUSED = [
    # option, what makes it useless, the two as they are named
    (
        "accept_changes",
        lambda: {"accept_changes": True},
        "true has no effect with a run that does not resume",
    ),
    ("log.project", lambda: {"log": LogArgs(project="a")}, "--log.project a has no effect with --logger_name csv"),
    ("log.run", lambda: {"log": LogArgs(run="a"), "logger_name": "mlflow"}, "--log.run a .* --logger_name mlflow"),
    (
        "log.group",
        lambda: {"log": LogArgs(group="a"), "logger_name": "litlogger"},
        "group a .* litlogger",
    ),
    ("log.teamspace", lambda: {"log": LogArgs(teamspace="a"), "logger_name": "wandb"}, "teamspace a .* wandb"),
    ("log.metadata", lambda: {"log": LogArgs(metadata={"a": 1})}, "--log.metadata .* --logger_name csv"),
    ("log.log_model", lambda: {"log": LogArgs(log_model=True)}, "--log.log_model True .* --logger_name csv"),
    ("log.save_logs", lambda: {"log": LogArgs(save_logs=False)}, "--log.save_logs False .* --logger_name csv"),
    ("log.checkpoint_name", lambda: {"log": LogArgs(checkpoint_name="a")}, "--log.checkpoint_name a .* csv"),
    (
        "eval.evaluate_example",
        lambda: {"eval": EvalArgs(max_new_tokens=None, evaluate_example="random")},
        "--eval.evaluate_example random has no effect with --eval.max_new_tokens null; remove it",
    ),
    (
        "teacher.cpu_offload",
        lambda: {"teacher": TeacherArgs(cpu_offload=True, cache_mode="read", **CACHE)},
        "--teacher.cpu_offload true has no effect with --teacher.cache_mode read; remove it",
    ),
    (
        "overwrite",
        lambda: {"overwrite": True, "teacher": TeacherArgs(cache_mode="fill", **CACHE)},
        "--overwrite true has no effect with --teacher.cache_mode fill; remove it",
    ),
    ("data.seed", lambda: {"data": LitData("a", seed=7)}, "--data.seed 7 has no effect with --data LitData"),
    *(
        (
            f"lora.{name}",
            lambda name=name, value=value: {"lora": LoRAArgs(**{name: value})},
            f"{name} {value} has no effect",
        )
        for name, value in {
            "alpha": 8,
            "dropout": 0.0,
            "query": False,
            "key": True,
            "value": False,
            "projection": True,
        }.items()
    ),
    ("lora.mlp", lambda: {"lora": LoRAArgs(mlp=True)}, "--lora.mlp True has no effect"),
    ("lora.head", lambda: {"lora": LoRAArgs(head=True)}, "--lora.head True has no effect"),
    (
        "teacher.cache_mode",
        lambda: {"teacher": TeacherArgs(cache_mode="fill")},
        "cache_mode fill has no effect",
    ),
    (
        "teacher.cache_dtype",
        lambda: {"teacher": TeacherArgs(cache_dtype="fp8")},
        "cache_dtype fp8 has no effect",
    ),
    (
        "teacher.cache_part",
        lambda: {"teacher": TeacherArgs(cache_part="1/2", **CACHE)},
        "is for .*cache_mode fill",
    ),
    *(
        (
            f"teacher.{name}",
            lambda name=name, value=value: {"teacher": TeacherArgs(**{name: value})},
            f"--teacher.{name} {value} has no effect where both models have one tokenizer. Give --teacher.tokenizer",
        )
        for name, value in {"min_aligned": 0.5, "chunk_temperature": 2.0}.items()
    ),
    ("teacher.use_base", lambda: {"teacher": TeacherArgs(use_base=True)}, "--teacher.use_base true without --lora.r"),
    ("hybrid_sharding", lambda: {"hybrid_sharding": True}, "--hybrid_sharding true with --num_nodes 1 --devices 1"),
    ("distill.mix.ratio", lambda: {"distill": DistillArgs(mix=MixArgs(0.3))}, "--distill.mix.ratio 0.3 has no effect"),
    ("distill.jsd.beta", lambda: {"distill": DistillArgs(jsd=JSDArgs(0.3))}, "--distill.jsd.beta 0.3 has no effect"),
    ("distill.skewed.skew", lambda: {"distill": DistillArgs(skewed=SkewedArgs(0.3))}, "skew 0.3 has no effect"),
    (
        "distill.alpha_beta.alpha",
        lambda: {"distill": DistillArgs(alpha_beta=AlphaBetaArgs(alpha=0.3))},
        "alpha 0.3 has no effect",
    ),
    (
        "distill.alpha_beta.beta",
        lambda: {"distill": DistillArgs(alpha_beta=AlphaBetaArgs(beta=0.3))},
        "beta 0.3 has no effect",
    ),
    ("distill.tad.top_k", lambda: {"distill": DistillArgs(tad=TADArgs(top_k=3))}, "top_k 3 has no effect"),
    (
        "distill.tad.tail_weight",
        lambda: {"distill": DistillArgs(tad=TADArgs(tail_weight=3.0))},
        "tail_weight 3.0 has no effect",
    ),
    ("distill.tad.weighting", lambda: {"distill": DistillArgs(tad=TADArgs(weighting="constant"))}, "has no effect"),
    ("distill.csd.weight", lambda: {"distill": DistillArgs(csd=CSDArgs("student"))}, "weight student has no effect"),
    ("distill.drkl.gamma", lambda: {"distill": DistillArgs(drkl=DRKLArgs(2.0))}, "gamma 2.0 has no effect"),
    *(
        (
            f"distill.schedule.{name}",
            lambda name=name: {"distill": DistillArgs(schedule=ScheduleArgs(**{name: (0.1, 0.5)}))},
            f"{name} .* has no effect with --distill.divergence akl",
        )
        for name in ("mix_ratio", "skew")
    ),
    ("distill.on_policy", lambda: {"distill": DistillArgs(on_policy=0.5, kd_ratio=0.0)}, "with --distill.kd_ratio 0"),
    (
        "distill.on_policy_tokens",
        lambda: {"distill": DistillArgs(on_policy_tokens=9)},
        "tokens 9 has no effect without",
    ),
    (
        "distill.on_policy_temperature",
        lambda: {"distill": DistillArgs(on_policy_temperature=0.0)},
        "temperature 0.0 has no effect without",
    ),
]
ALWAYS_USED = {
    *("access_token activation_checkpointing checkpoint_dir compile config data device_memory devices dry_run").split(),
    *("export_hf keep_last logger_name num_nodes on_nonfinite optimizer out_dir precision resume save_minutes").split(),
    *"seed teacher_checkpoint_dir teachers lora.r".split(),
    *"teacher.cache_dir teacher.precision teacher.quantize teacher.tokenizer".split(),
    *(f"distill.{name}" for name in "block_tokens compile divergence kd_ratio temperature".split()),
    "distill.schedule.temperature",
    # which ids are the head is logged and shown for every divergence
    *("distill.akl.mu", "distill.akl.head_rule"),
    *(f"eval.{name}" for name in "final_validation initial_validation interval max_iters max_new_tokens".split()),
    *(f"train.{name}" for name in "epochs global_batch_size log_interval lr_warmup_fraction lr_warmup_steps".split()),
    *(f"train.{name}" for name in "max_norm max_seq_length max_steps max_time max_tokens micro_batch_size".split()),
    *("train.min_lr train.save_interval train.tie_embeddings").split(),
}
"""Or refused wherever they cannot be, by tests of their own."""


def test_every_option_is_classified():
    options = {name for name in options_of("finetune_akl") if not name.endswith((".", "+"))}
    known = ALWAYS_USED | {name for name, _, _ in REFUSED}
    groups = {"train", "eval", "log", "teacher", "lora", "distill", "help", "-h"}
    groups |= {f"distill.{group}" for group in ("akl", "schedule", *TAKERS)}
    assert {name for name in options if not name.startswith(("data.", "optimizer.", "print_"))} - groups <= known
    assert not ALWAYS_USED & {name for name, _, _ in REFUSED}


@pytest.mark.parametrize(("option", "given", "message"), REFUSED, ids=[option for option, _, _ in REFUSED])
def test_an_option_without_effect_is_refused_before_anything_is_read(option, given, message):
    with pytest.raises(UserError, match=message) as error:
        setup(NOWHERE, **({"teacher_checkpoint_dir": None if option == "teacher.use_base" else NOWHERE} | given()))
    assert f"--{option}" in str(error.value)


@pytest.mark.parametrize(
    "given",
    [{"max_new_tokens": 9}, {"temperature": 0.5}, {"no_repeat_ngram": None}, {"batch_size": 2}, {"max_prompts": 3}],
    ids=str,
)
def test_options_of_answers_that_are_not_given(given):
    (name, value), *_ = given.items()
    with pytest.raises(UserError, match=rf"--generation.{name} {value} has no effect with --generation.seeds \[\]"):
        GenerationArgs(seeds=[], **given)
    GenerationArgs(seeds=[1], **given)


def test_a_run_that_fills_a_cache_says_what_it_does_not_use(student_dir, teacher_dir, short, tmp_path, capsys):
    given = {"distill": {"on_policy": 0.5, "kd_ratio": 0.7}, "keep_last": 3, "export_hf": True}
    fill(student_dir, teacher_dir, short, tmp_path / "out", tmp_path / "cache", **given)
    said = next(line for line in capsys.readouterr().out.splitlines() if "trains no student" in line)
    for words in ("--keep_last 3", "--export_hf true", "--distill.on_policy 0.5", "--distill.kd_ratio 0.7"):
        assert words in said
    for used in ("--train.global_batch_size", "--teacher", "--data", "--seed", "--eval.max_iters"):
        assert f"{used} " not in said.removeprefix("--teacher.cache_mode fill")
    assert said.endswith("have no effect.")


def test_a_loss_without_divergence_is_said(student_dir, teacher_dir, short, tmp_path, capsys):
    for kd_ratio in (0.0, 0.5):
        distil(
            student_dir,
            teacher_dir,
            short,
            tmp_path / str(kd_ratio),
            train={"max_steps": 1},
            distill={"kd_ratio": kd_ratio},
        )
        assert ("the divergence is measured, and teaches nothing" in capsys.readouterr().out) == (kd_ratio == 0)


def test_advice_names_the_options_of_an_evaluation(student_dir, teacher_dir, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "count", "output": "one two three " * 60}))
    options = {"val_split_fraction": 0.0, "cache_dir": tmp_path / "prepared", "num_proc": 1}
    make = partial(StreamingSFT, str(tmp_path / "long.jsonl"), mask_prompt=True, prompt_style=Default(), **options)
    evaluation = {"split": "training", "generation": GenerationArgs(seeds=[]), "out_dir": tmp_path / "out"}
    evaluate = partial(evaluate_akl, student_dir, teacher_checkpoint_dir=teacher_dir, **evaluation)
    with pytest.raises(UserError, match=r"the pair reads 128.\n.* \(long ones with --data.too_long drop\)"):
        evaluate(data=make(too_long="error"))
    with pytest.raises(UserError, match=r"tokens; --max_seq_length is 100.\n"):
        evaluate(data=make(too_long="error"), max_seq_length=100)
    with pytest.raises(UserError, match=r"leaves no training records.\n.* --data.too_long cut"):
        evaluate(data=make())
    evaluate(data=make(too_long="cut"))


@pytest.mark.parametrize("ignored", [-1, 0])
def test_another_label_for_what_does_not_count_is_refused(student_dir, teacher_dir, short, tmp_path, ignored):
    short.ignore_index = ignored
    with pytest.raises(UserError, match=f"--data.ignore_index {ignored} is not supported: .* -100 here; remove it"):
        distil(student_dir, teacher_dir, short, tmp_path / "out")
