"""What people get wrong: each wrong input is refused in two lines that name it and the way out, which is a way out."""

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import materials
import pytest
import torch
from helpers.commands import call, complete_call, complete_here, import_everything
from helpers.marks import with_all_slow_but
from helpers.options import make_parser
from safetensors.torch import save_file

from litgpt_akl.cli.main import COMMANDS
from litgpt_akl.cli.parser import Parser
from litgpt_akl.models.weights import read_config

MODELS = "student --teacher_checkpoint_dir teacher"
DATA = "--data JSON --data.json_path texts/records.json --data.mask_prompt true --data.val_split_fraction 0.5"
SHORT = "--train.max_seq_length 128 --train.max_steps 1 --train.global_batch_size 2 --train.micro_batch_size 2"
QUIET = "--eval.max_iters 1 --eval.max_new_tokens null"
NUMBERS = f"{SHORT} {QUIET} --out_dir out/new"
T = f"finetune_akl {MODELS}"
F = f"finetune_akl {MODELS} {DATA} {NUMBERS}"
NO_DATA = f"finetune_akl {MODELS} {NUMBERS}"
STREAMED = f"{NO_DATA} --data StreamingSFT --data.path"
E = f"evaluate_akl {MODELS} {DATA} --max_seq_length 128 --split training --max_records 1 --generation.max_new_tokens 2"
G = "generate_responses teacher --data StreamingSFT --data.path texts/records.jsonl --max_records 1 --truncated keep"
M = "make_student teacher made --layers 2"
HELD = f"--teacher_checkpoint_dir teacher {DATA} --teacher.cache_dir held"
P = f"export_prompts prompts.jsonl {HELD}"
TOP_K = "--teacher.cache_dir c --teacher.cache_dtype topk:"
IMPORT = f"import_hidden_states states {HELD}"
X = "export_hf student exported"
R = "report_akl run"


class Row(NamedTuple):
    """A wrong command line, what its message has to name, and the command line that is mended as it says.

    The mended one ends well, or, which takes less time, where ``until`` is refused: that is looked at later.
    """

    wrong: str
    named: list[str]
    mended: str
    until: str = ""


def of(base: str, *rows: tuple[str, str, str], until: str = "") -> list[Row]:
    """Rows of one command: what is added to it, pieces of the message between ``|``, and what is added in its place."""
    return [Row(f"{base} {wrong}", named.split("|"), f"{base} {mended}", until) for wrong, named, mended in rows]


ABSENT = "--data is missing"
"""What a command line without data is refused for, when all else but the optimizer has been looked at."""


TYPES = of(
    T,
    ("--seed many", "--seed|many|a whole number", "--seed 3"),
    ("--train.epochs 1.5", "--train.epochs|1.5|a whole number", "--train.epochs 2"),
    ("--train.epochs two", "--train.epochs|two|a whole number", "--train.epochs 2"),
    ("--train.epochs -1", "--train.epochs|-1|at least 1", "--train.epochs 1"),
    ("--train.epochs 0", "--train.epochs|0|at least 1", "--train.epochs 1"),
    ("--train.max_steps 0", "--train.max_steps|0|at least 1", "--train.max_steps 1"),
    ("--train.max_steps 1e3", "--train.max_steps|1000.0|a whole number", "--train.max_steps 1000"),
    ("--train.micro_batch_size 0", "--train.micro_batch_size|0|at least 1", "--train.micro_batch_size 1"),
    ("--train.global_batch_size -4", "--train.global_batch_size|-4|at least 1", "--train.global_batch_size 4"),
    ("--train.max_seq_length 0", "--train.max_seq_length|0|at least 1", "--train.max_seq_length 128"),
    ("--train.max_norm -1", "--train.max_norm|-1|above 0", "--train.max_norm 1"),
    ("--train.max_norm nan", "--train.max_norm|nan|a number", "--train.max_norm null"),
    ("--train.max_norm .nan", "--train.max_norm|nan|above 0", "--train.max_norm null"),
    ("--train.max_time 0", "--train.max_time|0|above 0", "--train.max_time null"),
    ("--train.min_lr -1e-5", "--train.min_lr|-1e-05|not be negative", "--train.min_lr 0"),
    ("--train.lr_warmup_fraction 2", "--train.lr_warmup_fraction|2|between 0 and 1", "--train.lr_warmup_fraction 0.5"),
    ("--train.lr_warmup_steps -1", "--train.lr_warmup_steps|-1|not be negative", "--train.lr_warmup_steps 1"),
    ("--distill.temperature 0", "--distill.temperature|0|above 0", "--distill.temperature 1"),
    ("--distill.temperature hot", "--distill.temperature|hot|a number", "--distill.temperature 1"),
    ("--distill.temperature .nan", "--distill.temperature|nan|above 0", "--distill.temperature 1"),
    ("--distill.kd_ratio 1.5", "--distill.kd_ratio|1.5|between 0 and 1", "--distill.kd_ratio 1"),
    ("--distill.on_policy 2", "--distill.on_policy|2.0|from 0 to 1", "--distill.on_policy 1"),
    ("--distill.akl.mu 0", "--distill.akl.mu|0|above 0 and at most 1", "--distill.akl.mu 0.5"),
    ("--distill.block_tokens 0", "--distill.block_tokens|0|at least 1", "--distill.block_tokens 8"),
    ("--lora.r 0", "--lora.r|0|at least 1|null", "--lora.r null"),
    ("--lora.r 2 --lora.alpha 0", "--lora.alpha|0|at least 1", "--lora.r 2 --lora.alpha 1"),
    ("--lora.r 2 --lora.dropout 1", "--lora.dropout|1.0|below 1", "--lora.r 2 --lora.dropout 0"),
    ("--save_minutes -1", "--save_minutes|-1|above 0|null", "--save_minutes null"),
    ("--keep_last 0", "--keep_last|0|at least 1|null", "--keep_last null"),
    ("--seed -1", "--seed|-1|from 0 to", "--seed 0"),
    ("--seed 99999999999999999999", "--seed|99999999999999999999|from 0 to", "--seed 0"),
    ("--device_memory -1", "--device_memory|-1|above 0|Leave it out", ""),
    ("--eval.interval 0", "--eval.interval|0|at least 1", "--eval.interval 1"),
    ("--eval.evaluate_example last", "--eval.evaluate_example|last|first, random or", "--eval.evaluate_example first"),
    until=ABSENT,
)
LISTED = "finetune_akl student --teachers"
BOTH = "'[{directory: teacher}, {directory: student}]'"
SEVERAL = [
    *of(
        f"{LISTED}",
        ("'[]'", "--teachers []|names no teacher|[{directory: A}, {directory: B}]", BOTH),
        ("'[{directory: teacher, weight: 0}]'", "the weight of teacher|above 0|0.0", "'[{directory: teacher}]'"),
        (
            "'[{directory: teacher, weight: 1}, {directory: student, weight: -1}]'",
            "the weight of student|above 0|-1.0|Raise it",
            "'[{directory: teacher, weight: 1}, {directory: student, weight: 1}]'",
        ),
        ("'[{directory: teacher, weight: .nan}]'", "the weight of teacher|above 0|nan", "'[{directory: teacher}]'"),
        ("'[{directory: teacher}, {directory: ./teacher/}]'", "the directory|/teacher more than once", BOTH),
        (
            "'[{directory: teacher, cache_dir: c}, {directory: student, cache_dir: c}]'",
            "the cache_dir|/c more than once",
            "'[{directory: teacher, cache_dir: c}, {directory: student}]'",
        ),
        (f"{BOTH} --teacher_checkpoint_dir teacher", "--teachers|--teacher_checkpoint_dir teacher|Leave one", BOTH),
        (f"{BOTH} --teacher.use_base true --lora.r 2", "--teachers|--teacher.use_base true|Leave one", BOTH),
        (
            f"{BOTH} --teacher.cache_dir c",
            "--teacher.cache_dir c|a cache of its own|cache_dir in --teachers",
            "'[{directory: teacher, cache_dir: c}, {directory: student}]'",
        ),
        (
            "'[{directory: teacher, cache_dir: c}, {directory: student}]' --teacher.cache_mode fill",
            "--teacher.cache_mode fill|student has no cache_dir",
            "'[{directory: teacher, cache_dir: c}, {directory: student, cache_dir: d}]' --teacher.cache_mode fill",
        ),
        (f"{BOTH} --teacher.cache_mode read", "cache_mode read has no effect|without a cache_dir in --teachers", BOTH),
        ("teacher", "--teachers|a list with directory, weight, cache_dir|teacher", "'[{directory: teacher}]'"),
        ("'[{weight: 2}]'", "--teachers|directory", "'[{directory: teacher, weight: 2}]'"),
        ("'[{directory: teacher, wieght: 2}]'", "--teachers|wieght", "'[{directory: teacher, weight: 2}]'"),
        ("'[{directory: teacher, weight: much}]'", "--teachers|much", "'[{directory: teacher, weight: 2}]'"),
        until="--data is missing",
    ),
    *of(
        f"finetune_akl student {DATA} {NUMBERS} --teachers",
        (f"{BOTH[:-2]}, {{directory: missing}}]'", "missing does not exist", BOTH),
        (f"{BOTH[:-2]}, {{directory: other}}]'", "tokenizer|student|other", BOTH),
    ),
]
OPTIMIZERS = of(
    f"finetune_akl missing --teacher_checkpoint_dir teacher {DATA}",
    ("--train.min_lr 1", "--train.min_lr|1.0|0.001|Lower min_lr", "--train.min_lr 1e-4"),
    ("--optimizer.lr fast", "--optimizer.lr|fast|a number above 0|--optimizer.lr 1e-5", "--optimizer.lr 1e-5"),
    ("--optimizer.lr -1", "--optimizer.lr|-1|a number above 0|--optimizer.lr 1e-5", "--optimizer.lr 1e-5"),
    ("--optimizer.lr 0", "--optimizer.lr|0|a number above 0|--optimizer.lr 1e-5", "--optimizer.lr 1e-5"),
    ("--optimizer.lr nan", "--optimizer.lr|nan|a number above 0|--optimizer.lr 1e-5", "--optimizer.lr 1e-5"),
    ("--optimizer.lr inf", "--optimizer.lr|inf|a number above 0|--optimizer.lr 1e-5", "--optimizer.lr 1e-5"),
    ("--optimizer.betas 0.9", "--optimizer|betas|0.9", "--optimizer.betas '[0.9, 0.95]'"),
    (
        "--optimizer.momentum 0.9",
        "--optimizer.momentum|0.9|AdamW|It takes lr, betas",
        "--optimizer.betas '[0.9, 0.95]'",
    ),
    ("--optimizer Adamm", "--optimizer Adamm|did you mean Adam?|such as AdamW", "--optimizer AdamW"),
    ("--optimizer none.Such", "--optimizer none.Such|such as AdamW", "--optimizer AdamW"),
    ("--optimizer LBFGS", "--optimizer LBFGS|such as AdamW", "--optimizer AdamW"),
    until="missing does not exist",
)
CHOICES = of(
    T,
    ("--distill.divergence kll", "--distill.divergence|kll|akl, fkl, rkl", "--distill.divergence fkl"),
    (
        "--distill.akl.head_rule papr",
        "--distill.akl.head_rule|papr|did you mean paper?",
        "--distill.akl.head_rule paper",
    ),
    ("--logger_name tensorbord", "--logger_name|tensorbord|did you mean tensorboard?", "--logger_name tensorboard"),
    ("--precision bf16", "--precision bf16|32-true, bf16-true, bf16-mixed", "--precision bf16-true"),
    ("--precision 16-true", "--precision 16-true|32-true, bf16-true, bf16-mixed", "--precision bf16-true"),
    ("--teacher.precision bf16", "--teacher.precision|bf16|bf16-true", "--teacher.precision bf16-true"),
    ("--teacher.quantize int4", "--teacher.quantize|int4|int8", "--teacher.quantize null"),
    ("--on_nonfinite ignore", "--on_nonfinite|ignore|stop or skip", "--on_nonfinite skip"),
    ("--devices 0", "--devices|0|--devices 1", "--devices 1"),
    ("--devices many", "--devices|many|--devices 1", "--devices 1"),
    ("--devices 4000", "--devices 4000|CPU cores|fewer", "--devices 1"),
    ("--num_nodes 0", "--num_nodes|0|at least 1", "--num_nodes 1"),
    ("--export_hf maybe", "--export_hf|maybe|true or false", "--export_hf true"),
    ("--train.tie_embeddings perhaps", "--train.tie_embeddings|perhaps|true or false", "--train.tie_embeddings null"),
    until=ABSENT,
)
NAMES = of(
    T,
    ("--lr 1e-4", "no option --lr|--optimizer.lr", "--optimizer.lr 1e-4"),
    ("--learning_rate 1e-4", "no option --learning_rate|--optimizer.lr", "--optimizer.lr 1e-4"),
    ("--train.lr 1e-4", "no option --train.lr|--optimizer.lr", "--optimizer.lr 1e-4"),
    ("--train.learning_rate 1e-4", "no option --train.learning_rate|--optimizer.lr", "--optimizer.lr 1e-4"),
    ("--epochs 1", "no option --epochs|--train.epochs", "--train.epochs 1"),
    ("--num_train_epochs 1", "no option --num_train_epochs|--train.epochs", "--train.epochs 1"),
    ("--batch_size 2", "no option --batch_size|--train.global_batch_size", "--train.global_batch_size 2"),
    ("--per_device_train_batch_size 2", "no option --per_d|--train.micro_batch_size", "--train.micro_batch_size 2"),
    ("--gradient_accumulation_steps 2", "no option --gr|--train.global_batch_size", "--train.global_batch_size 4"),
    ("--output_dir out/new", "no option --output_dir|--out_dir", "--out_dir out/new"),
    ("--temperature 2", "no option --temperature|--distill.temperature", "--distill.temperature 2"),
    ("--divergence fkl", "no option --divergence|--distill.divergence", "--distill.divergence fkl"),
    ("--max_seq_length 64", "no option --max_seq_length|--train.max_seq_length", "--train.max_seq_length 64"),
    ("--cutoff_len 64", "no option --cutoff_len|--train.max_seq_length", "--train.max_seq_length 64"),
    ("--bf16 true", "no option --bf16|--precision", "--precision bf16-true"),
    ("--lora_rank 2", "no option --lora_rank|--lora.r", "--lora.r 2"),
    ("--warmup_steps 1", "no option --warmup_steps|--train.lr_warmup_steps", "--train.lr_warmup_steps 1"),
    ("--beta 0.3", "no option --beta|--distill.jsd.beta or --distill.alpha_beta.beta", "--distill.divergence jsd"),
    ("--weight_decay 0.1", "no option --weight_decay|--optimizer.weight_decay", "--optimizer.weight_decay 0.1"),
    ("--gradient_checkpointing true", "no option|--activation_checkpointing", "--activation_checkpointing true"),
    ("--trian.epochs 1", "no option --trian.epochs|--train.epochs", "--train.epochs 1"),
    ("--distill.temprature 2", "no option --distill.temprature|--distill.temperature", "--distill.temperature 2"),
    ("--lora 2", "--lora|2|--lora.r", "--lora.r 2"),
    ("--distill fkl", "--distill|fkl|--distill.divergence", "--distill.divergence fkl"),
    ("more", "unexpected argument: more", ""),
    ("--seed", "--seed|expected one argument", "--seed 3"),
    until=ABSENT,
)
DATA_NAMES = [
    *of(
        f"finetune_akl missing --teacher_checkpoint_dir teacher {DATA}",
        ("--data JSN", "--data|JSN|did you mean JSON?", ""),
        ("--data json", "--data|json|did you mean JSON?", ""),
        ("--data texts", "--data|texts|--data StreamingSFT --data.path texts", "--data StreamingSFT --data.path texts"),
        ("--data.jsonpath x", "no option --data.jsonpath|--data.json_path", "--data.json_path texts/records.json"),
        ("--mask_prompt true", "no option --mask_prompt|--data.mask_prompt true", "--data.mask_prompt true"),
        (
            "--distill.on_policy 0.5 --data.mask_prompt false",
            "--distill.on_policy 0.5|--data.mask_prompt true",
            "--distill.on_policy 0.5 --data.mask_prompt true",
        ),
        until="missing does not exist",
    ),
]
MISSING = [
    Row(f"finetune_akl student --teacher teacher {DATA} {NUMBERS}", ["--teacher_checkpoint_dir"], F),
    Row(
        f"finetune_akl --student student --teacher_checkpoint_dir teacher {DATA} {NUMBERS}", ["give checkpoint_dir"], F
    ),
    Row(
        f"finetune_akl --model_name_or_path student --teacher_dir teacher {DATA} {NUMBERS}", ["give checkpoint_dir"], F
    ),
    Row(f"finetune_akl --teacher_checkpoint_dir teacher {DATA} {NUMBERS}", ["checkpoint_dir is missing"], F),
    Row(
        f"finetune_akl student {DATA} {NUMBERS}", ["--teacher_checkpoint_dir is missing", "--teacher.use_base true"], F
    ),
    Row(NO_DATA, ["--data is missing", "--data StreamingSFT --data.path", "--data Alpaca"], F),
    Row(f"{NO_DATA} --data JSON", ["--data.json_path is missing"], F),
    Row(
        f"{NO_DATA} --data.path texts/records.jsonl",
        ["--data.path", "--data StreamingSFT"],
        f"{STREAMED} texts/records.jsonl",
    ),
    Row("finetune_alk student", ["no command finetune_alk", "did you mean finetune_akl?"], F),
]


def finetune(student: str = "student", teacher: str = "teacher", data: str = DATA, more: str = NUMBERS) -> str:
    return f"finetune_akl {student} --teacher_checkpoint_dir {teacher} {data} {more}"


PATHS = [
    Row(finetune(student="missing"), ["missing", "does not exist", "as checkpoint_dir"], F),
    Row(finetune(teacher="missing"), ["missing", "does not exist", "as --teacher_checkpoint_dir"], F),
    Row(finetune(student="data/file.txt"), ["data/file.txt"], F),
    Row(finetune(student="empty"), ["empty"], F),
    Row(finetune(teacher="data"), ["data"], F),
    Row(finetune(student="hf"), ["hf", "litgpt convert_to_litgpt"], F),
    Row(finetune(more=NUMBERS.replace("out/new", "data/file.txt")), ["--out_dir", "data/file.txt"], F),
    Row(finetune(more=NUMBERS.replace("out/new", "data/file.txt/out")), ["--out_dir", "data/file.txt"], F),
    Row(finetune(more=NUMBERS.replace("out/new", "student")), ["--out_dir", "student"], F),
    Row(
        f"{F} --teacher.cache_dir data/file.txt", ["--teacher.cache_dir", "data/file.txt"], f"{F} --teacher.cache_dir c"
    ),
    Row(
        f"{NO_DATA} --data JSON --data.json_path missing.json",
        ["--data.json_path", "missing.json", "does not exist"],
        F,
    ),
]
SAMPLES = [
    Row(f"{STREAMED} {wrong}", named.split("|"), f"{STREAMED} {mended}")
    for wrong, named, mended in [
        ("data/missing.jsonl", "--data.path data/missing.jsonl|does not exist", "texts/records.jsonl"),
        (
            "texts/records.jsonl --data.val_path missing",
            "--data.val_path missing|does not exist",
            "texts/records.jsonl",
        ),
        ("'texts/*.parquet'", "--data.path texts/*.parquet|no file matches it", "'texts/*.jsonl'"),
        ("'texts/{records,more}.jsonl'", "--data.path texts/{|Braces|'texts/*.jsonl'", "'texts/*.jsonl'"),
        (
            "texts/records.jsonl --data.chat_template chat.jinja",
            "--data.chat_template chat.jinja|neither a file",
            "texts/records.jsonl",
        ),
        ("data/empty.jsonl", "data/empty.jsonl", "texts/records.jsonl"),
        ("data/broken.jsonl", "data/broken.jsonl|line 2", "data/broken.jsonl --data.on_error skip"),
        ("data/columns.jsonl", "data/columns.jsonl|line 1|no field|generate_responses", "texts/records.jsonl"),
        ("data/file.txt", "data/file.txt", "texts/records.jsonl"),
        ("data/nothing", "data/nothing", "texts/records.jsonl"),
        ("data/long.jsonl", "data/long.jsonl|--data.too_long cut", "data/long.jsonl --data.too_long cut"),
        (
            "data/prompts.jsonl --data.too_long cut",
            "data/prompts.jsonl|line 1|no token|128 tokens",
            "texts/records.jsonl",
        ),
        ("texts/records.jsonl --data.val_split_fraction 2", "val_split_fraction|2.0", "texts/records.jsonl"),
        ("texts/records.jsonl --data.prompt_style alpacca", "prompt_style|alpacca", "texts/records.jsonl"),
        (
            "texts/records.jsonl --data.too_long chop",
            "--data.too_long|chop|cut",
            "texts/records.jsonl --data.too_long cut",
        ),
        ("texts/records.jsonl --data.num_proc 0", "num_proc|0|at least 1", "texts/records.jsonl --data.num_proc 1"),
    ]
]
PAIRS = [
    Row(finetune(teacher="other"), ["tokenizer", "student", "other"], F),
    Row(f"{F} --num_nodes 2", ["--num_nodes 2", "torchrun or srun", "--num_nodes 1"], F),
    Row(finetune(teacher="without_weights"), ["without_weights", "lit_model.pth"], F),
]
TOGETHER = of(
    T,
    ("--teacher.use_base true", "--teacher.use_base true|--lora.r", ""),
    ("--lora.r 2 --teacher.use_base true", "--teacher.use_base true|--teacher_checkpoint_dir teacher|two teachers", ""),
    ("--lora.alpha 8", "--lora.alpha 8|--lora.r", "--lora.alpha 8 --lora.r 2"),
    (
        "--lora.r 2 --lora.query false --lora.value false",
        "--lora.r 2|nothing to adapt|--lora.query",
        "--lora.r 2 --lora.query true --lora.value false",
    ),
    (
        "--distill.jsd.beta 0.3",
        "--distill.jsd.beta 0.3|akl|divergence jsd",
        "--distill.jsd.beta 0.3 --distill.divergence jsd",
    ),
    (
        "--distill.on_policy_tokens 9",
        "--distill.on_policy_tokens 9|--distill.on_policy",
        "--distill.on_policy_tokens 9 --distill.on_policy 0.5",
    ),
    (
        "--distill.on_policy 0.5 --distill.kd_ratio 0",
        "--distill.on_policy 0.5|kd_ratio 0|Raise kd_ratio",
        "--distill.on_policy 0.5 --distill.kd_ratio 0.5",
    ),
    ("--train.max_steps null --train.epochs null", "--train.epochs|--train.max_steps|both null", "--train.epochs 1"),
    (
        "--train.lr_warmup_steps 1 --train.lr_warmup_fraction 0.1",
        "lr_warmup_steps|lr_warmup_fraction",
        "--train.lr_warmup_steps 1",
    ),
    ("--train.max_tokens 100", "--train.max_tokens 100|--train.max_steps", "--train.max_steps 1"),
    ("--hybrid_sharding true", "--hybrid_sharding true|--num_nodes 1|Leave it out", ""),
    ("--teacher.cpu_offload true", "--teacher.cpu_offload true|CPU|Leave it out", ""),
    ("--teacher.cache_mode read", "--teacher.cache_mode read|--teacher.cache_dir", ""),
    ("--teacher.cache_dir c --teacher.cache_part 3/2", "--teacher.cache_part|fill", "--teacher.cache_dir c"),
    ("--teacher.cache_dir c --teacher.cache_dtype topk:0", "--teacher.cache_dtype|got 'topk:0'", f"{TOP_K}64"),
    (f"{TOP_K}16 --distill.divergence jsd", "--distill.divergence jsd|topk:16|akl, fkl, rkl, mix or tad", f"{TOP_K}16"),
    (f"{TOP_K}16 --distill.temperature 2", "--distill.temperature 2.0|topk:16|--distill.temperature 1", f"{TOP_K}16"),
    (
        f"{TOP_K}8 --distill.divergence tad",
        "--distill.tad.top_k 10|--teacher.cache_dtype topk:64",
        f"{TOP_K}64 --distill.divergence tad",
    ),
    (f"{TOP_K}8 --distill.compile true", "--distill.compile true|--teacher.cache_dtype topk:8|remove it", f"{TOP_K}8"),
    ("--log.project mine", "--log.project mine|--logger_name csv|remove it", ""),
    ("--accept_changes true", "--accept_changes true|remove it", ""),
    ("--overwrite true --resume true", "--overwrite true|--resume true|Leave one", "--overwrite true"),
    (
        "--distill.mu 0.3 --distill.akl.mu 0.4",
        "--distill.mu 0.3|--distill.akl.mu 0.4|Leave --distill.mu out",
        "--distill.akl.mu 0.4",
    ),
    until=ABSENT,
)
RESUMED = [
    Row(f"{F} --resume true", ["--resume true", "out/new", "Leave --resume out, or use auto"], f"{F} --resume auto"),
    Row(f"{F} --resume step-000004", ["--resume step-000004"], F),
    Row(
        finetune(more=f"{SHORT} {QUIET} --out_dir run"),
        ["run", "--overwrite true"],
        f"{F} --out_dir run --overwrite true",
    ),
]
CONFIGURED = [
    Row(f"{F} --config {name}", named.split("|"), f"{F} --config good.yaml")
    for name, named in [
        ("missing.yaml", "--config|missing.yaml"),
        ("key.yaml", "--train.epoch|did you mean --train.epochs?"),
        ("group.yaml", "--trian.epochs|did you mean --train.epochs?"),
        ("value.yaml", "--seed|many|a whole number"),
        ("tabs.yaml", "--config tabs.yaml|line 2|spaces, not by tabs"),
        ("empty.yaml", "--config empty.yaml|train: {epochs: 3}"),
        ("list.yaml", "--config list.yaml|train: {epochs: 3}|- train"),
        ("data", "--config|data"),
        ("rate.yaml", "--optimizer.lr|fast|a number above 0"),
    ]
]
EVALUATED = [
    *of(
        E.replace("student", "missing", 1),
        ("--teacher teacher", "no option --teacher|--teacher_checkpoint_dir", ""),
        ("--split test", "--split|test|validation", "--split training"),
        ("--max_records 0", "--max_records|0|at least 1", "--max_records 1"),
        ("--mu 2", "--mu|2.0|above 0 and at most 1", "--mu 0.5"),
        ("--devices 0", "--devices|0|--devices 1", "--devices 1"),
        ("--generation.temperature -1", "--generation.temperature|-1|not be negative", "--generation.temperature 1"),
        ("--generation.seeds [1,1]", "--generation.seeds|[1, 1]|different", "--generation.seeds [1,2]"),
        ("--precision bf16-mixed", "--precision|bf16-mixed|32-true or bf16-true", "--precision 32-true"),
        ("--data.mask_prompt false", "--data.mask_prompt true|--generation.seeds '[]'", "--data.mask_prompt true"),
        ("--batch_size two", "--batch_size|two|a whole number", "--batch_size 2"),
        until="missing does not exist",
    ),
    Row(
        f"{E} --before_checkpoint_dir missing",
        ["missing", "does not exist", "as --before_checkpoint_dir"],
        f"{E} --before_checkpoint_dir student",
    ),
    Row(f"{E} --out_dir teacher", ["--out_dir", "teacher"], f"{E} --out_dir out/evaluated"),
    Row(f"evaluate_akl student {DATA}", ["--teacher_checkpoint_dir is missing"], E),
    Row(f"evaluate_akl {MODELS}", ["--data is missing", "--data Alpaca"], E),
    Row(E.replace("student --", "missing --"), ["missing", "does not exist"], E),
]
GENERATED = [
    *of(
        G.replace("teacher", "missing"),
        ("", "--out is missing", "--out taught.jsonl"),
        ("--out taught.txt", "--out taught.txt|.jsonl", "--out taught.jsonl"),
        ("--out taught.jsonl --samples 0", "--samples|0|at least 1", "--out taught.jsonl --samples 1"),
        (
            "--out taught.jsonl --temperature -1",
            "--temperature -1|not be negative",
            "--out taught.jsonl --temperature 1",
        ),
        (
            "--out taught.jsonl --samples 2 --temperature 0",
            "--samples 2|--temperature 0|--samples 1",
            "--out taught.jsonl --samples 1 --temperature 0",
        ),
        ("--out taught.jsonl --truncated cut", "--truncated|cut|drop or keep", "--out taught.jsonl --truncated keep"),
        ("--output_file taught.jsonl", "--out", "--out taught.jsonl"),
        ("--out taught.jsonl --num_samples 2", "no option --num_samples|--samples", "--out taught.jsonl --samples 2"),
        until="missing does not exist",
    ),
    Row(
        f"{G} --out data/file.jsonl",
        ["data/file.jsonl", "--overwrite true"],
        f"{G} --out data/file.jsonl --overwrite true",
    ),
    Row(
        "generate_responses teacher --out taught.jsonl",
        ["--data", "--data StreamingSFT --data.path"],
        f"{G} --out taught.jsonl",
    ),
    Row(
        f"{G.replace('teacher', 'missing')} --out taught.jsonl",
        ["missing", "does not exist", "as checkpoint_dir"],
        f"{G} --out taught.jsonl",
    ),
    Row(
        f"generate_responses teacher {DATA} --out taught.jsonl",
        ["--data JSON", "--data StreamingSFT --data.path"],
        f"{G} --out taught.jsonl",
    ),
]
EXCHANGED = [
    Row(f"export_prompts {HELD}", ["out is missing"], P),
    Row(P.replace("prompts.jsonl", "data/file.jsonl"), ["data/file.jsonl", "--overwrite true"], P),
    Row(P.replace(DATA, ""), ["--data is missing", "--data StreamingSFT"], P),
    Row(P.replace("--teacher.cache_dir held", ""), ["--teacher.cache_dir is missing"], P),
    Row(P.replace("held", "s3://bucket/held"), ["--teacher.cache_dir s3://bucket/held", "a local folder"], P),
    Row(P.replace("dir teacher", "dir missing"), ["missing does not exist", "--teacher_checkpoint_dir"], P),
    Row(f"{P} --max_seq_length 0", ["--max_seq_length", "0", "at least 1"], f"{P} --max_seq_length 128"),
    Row(f"{P} --teacher.precision fp8", ["--teacher.precision", "fp8"], f"{P} --teacher.precision bf16-true"),
    Row(f"import_hidden_states {HELD}", ["source is missing"], IMPORT),
    Row(IMPORT.replace("states states", "states missing"), ["missing", "given as source"], IMPORT),
    Row(IMPORT.replace("states states", "states data"), ["data", "*.jsonl", "token_ids"], IMPORT),
    Row(IMPORT.replace(DATA, ""), ["--data is missing", "--data StreamingSFT"], IMPORT),
    Row(IMPORT.replace("--teacher.cache_dir held", ""), ["--teacher.cache_dir is missing"], IMPORT),
    Row(f"{IMPORT} --layer 2", ["--layer 2", "2 layers", "Leave it out"], IMPORT),
    Row(f"{IMPORT} --layer last", ["--layer", "last", "a whole number"], f"{IMPORT} --layer 1"),
    Row(f"{IMPORT} --normed maybe", ["--normed", "maybe"], f"{IMPORT} --normed true"),
]
MADE = [
    Row("make_student teacher made", ["--layers"], M),
    Row("make_student teacher made --layers 0", ["layers", "0", "4 layers"], M),
    Row("make_student teacher made --layers 9", ["layers", "9", "4 layers"], M),
    Row("make_student teacher made --layers some", ["--layers", "some", "a whole number"], M),
    Row(
        "make_student teacher made --layers [1,7]",
        ["layers", "[7]", "0 to 3"],
        "make_student teacher made --layers [1,3]",
    ),
    Row(
        "make_student teacher made --layers [3,1]",
        ["layers", "[3, 1]", "[1, 3]"],
        "make_student teacher made --layers [1,3]",
    ),
    Row("make_student teacher made --num_layers 2", ["no option --num_layers", "--layers"], M),
    Row(
        "make_student teacher made --memory 2", ["--memory", "2", "its unit"], "make_student teacher made --memory 2MB"
    ),
    Row("make_student teacher made --speed fast", ["--speed", "fast", "a number"], M),
    Row("make_student teacher made --layers 2 --memory 2MB", ["--layers 2", "--memory 2MB", "one of them"], M),
    Row("make_student teacher teacher --layers 2", ["out_dir", "teacher"], M),
    Row("make_student teacher data --layers 2", ["data"], M),
    Row("make_student missing made --layers 2", ["missing", "does not exist", "as teacher_dir"], M),
    Row("make_student --teacher teacher made --layers 2", ["give teacher_dir without a name"], M),
]
EXPORTED = [
    Row("export_hf student", ["out_dir is missing"], X),
    Row("export_hf missing exported", ["missing", "does not exist", "as checkpoint_dir"], X),
    Row("export_hf hf exported", ["hf"], X),
    Row("export_hf empty exported", ["empty"], X),
    Row("export_hf student data", ["data"], X),
    Row("export_hf student student", ["out_dir", "student"], X),
    Row("export_hf student --out_dir exported", ["give out_dir without a name"], X),
    Row("export_hf without_weights exported", ["without_weights", "lit_model.pth"], X),
]
REPORTED = [
    Row("report_akl", ["runs is missing"], R),
    Row("report_akl missing", ["missing"], R),
    Row("report_akl data", ["data"], R),
    Row(
        "report_akl run --out new/page.html",
        ["--out new/page.html", "new does not exist"],
        "report_akl run --out page.html",
    ),
    Row("report_akl run --out data", ["--out data", "data/report.html"], "report_akl run --out data/report.html"),
    Row(
        "report_akl run --out data/file.txt",
        ["--out data/file.txt", "--overwrite true"],
        "report_akl run --out data/file.txt --overwrite true",
    ),
    Row("report_akl run --out_dir page.html", ["no option --out_dir", "--out"], "report_akl run --out page.html"),
    Row("report_akl --run run", ["give runs without a name"], R),
]
ROWS = [
    *itertools.chain(
        TYPES, OPTIMIZERS, CHOICES, NAMES, DATA_NAMES, MISSING, PATHS, SAMPLES, PAIRS, TOGETHER, RESUMED, CONFIGURED
    ),
    *itertools.chain(SEVERAL, EVALUATED, GENERATED, EXCHANGED, MADE, EXPORTED, REPORTED),
]
TRAINED = {row.mended for row in RESUMED}
"""Rows whose way out is tried by a whole run, not by a dry one."""
WORDS = "one two three four five six seven eight nine ten"
GOOD = '{"instruction": "a", "output": "b"}\n'
CONTENT = {
    "texts/records.jsonl": "".join(f'{{"instruction": "count {n}", "output": "one two {n}"}}\n' for n in range(12)),
    "texts/records.json": json.dumps([{"instruction": f"count {n}", "output": f"one two {n}"} for n in range(12)]),
    "data/empty.jsonl": "",
    "data/broken.jsonl": GOOD + '{"instruction\n' + GOOD * 150,
    "data/columns.jsonl": '{"question": "a", "verdict": "b"}\n' * 4,
    "data/file.txt": "nothing\n",
    "data/file.jsonl": "{}\n",
    "data/long.jsonl": "".join(f'{{"instruction": "count {n}", "output": "{WORDS * 40}"}}\n' for n in range(6)),
    "data/prompts.jsonl": "".join(f'{{"instruction": "{WORDS * 40} {n}", "output": "one"}}\n' for n in range(6)),
    "good.yaml": "train:\n  epochs: 3\n",
    "key.yaml": "train:\n  epoch: 3\n",
    "group.yaml": "trian:\n  epochs: 3\n",
    "value.yaml": "seed: many\n",
    "tabs.yaml": "train:\n\tepochs: 3\n",
    "list.yaml": "- train\n",
    "empty.yaml": "",
    "rate.yaml": "optimizer:\n  lr: fast\n",
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    written: list[str]


@pytest.fixture(scope="module")
def parser() -> Parser:
    import_everything()
    return make_parser()


def contents(directory: Path) -> dict[str, int]:
    """Of files the time of the last change; of folders only that they are there."""
    paths = directory.rglob("*")
    return {str(path.relative_to(directory)): path.is_dir() or path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def place(tmp_path_factory, parser) -> Path:
    """Two models, records and a run."""
    directory = tmp_path_factory.mktemp("wrong")
    materials.write_teacher(directory / "teacher")
    materials.write_student(directory / "student", tied=True)
    for name in ("empty", "texts", "data/nothing"):
        (directory / name).mkdir(parents=True)
    for name, text in CONTENT.items():
        (directory / name).write_text(text)
    for name, left_out in {"without_weights": "lit_model.pth", "other": "", "hf": "model_config.yaml"}.items():
        shutil.copytree(directory / "teacher", directory / name, ignore=shutil.ignore_patterns(left_out))
    (directory / "hf" / "lit_model.pth").rename(directory / "hf" / "model.safetensors")
    width = read_config(directory / "teacher").n_embd
    states = {"token_ids": torch.arange(3), "hidden_states": torch.ones(3, 2, width)}
    (directory / "states").mkdir()
    save_file(states, directory / "states" / "request.safetensors")
    tokenizer = json.loads((directory / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [*vocabulary][200:202]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (directory / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = shlex.split(finetune(more=f"{SHORT} {QUIET} --out_dir run"))
    assert complete_call(partial(call, parser, words, directory)).returncode == 0
    return directory


def end(parser: Parser, place: Path, line: str, here: bool = False) -> Ended:
    """How a command line ends, and what it has written, which is removed again; ``here`` if it ends early enough."""
    before = contents(place)
    done = (complete_here if here else complete_call)(partial(call, parser, shlex.split(line), place))
    after = contents(place)
    written = [name for name in after if before.get(name) != after[name]]
    for name in sorted(after.keys() - before.keys(), reverse=True):
        path = place / name
        path.rmdir() if path.is_dir() else path.unlink()
    return Ended(done.returncode, done.stdout, done.stderr, written)


@pytest.fixture(scope="module")
def ended(parser, place) -> Callable[[str], Ended]:
    """Several lines are mended in the same way, which is tried once."""
    return cache(partial(end, parser, place))


@pytest.mark.parametrize("row", ROWS, ids=[row.wrong for row in ROWS])
def test_a_wrong_input_is_refused_with_a_way_out(ended, row):
    found = ended(row.wrong, bool(row.until))
    assert found.code in (1, 2) and "Traceback" not in found.out + found.err
    message = found.err.rpartition("error: ")[2]
    assert 1 <= message.count("\n") <= 2, found.err
    assert [piece for piece in row.named if piece not in message] == [], message
    assert found.written == []


WAYS_OUT = [*dict.fromkeys((row.mended, row.until) for row in ROWS)]
"""Several lines are mended in the same way."""


@pytest.mark.parametrize(("line", "until"), with_all_slow_but(WAYS_OUT[::3], WAYS_OUT))
def test_the_way_out_works(ended, line, until):
    if until:
        assert until in ended(line, True).err
        return
    dry = line.startswith("finetune_akl") and line not in TRAINED
    found = ended(f"{line} --dry_run true" if dry else line)
    assert found.code == 0, found.err


def test_there_are_rows_of_every_command():
    counts = {command: sum(row.wrong.startswith(command) for row in ROWS) for command in COMMANDS}
    assert len(ROWS) >= 120 and counts["finetune_akl"] >= 60 and min(counts.values()) >= 7
    assert len({row.wrong for row in ROWS}) == len(ROWS)
