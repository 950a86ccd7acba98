"""Does a teacher of another tokenizer teach? Held-out bits per byte of text that the teacher wrote, by three seeds.

    python scripts/experiments/compare_tokenizers.py   # glassllm's English model and its 1,024 tokens, some minutes

Students are of two layers, random at the start, and read a byte-level BPE of 700 tokens that cuts digits by threes; the
teacher's is of characters. Each seed trains one student by cross-entropy alone and one with the teacher beside it, on
the same records in the same order. What is finished is kept in --out: the same command goes on where it was stopped. It
ends with `tokenizers.json` and `tokenizers.md` there.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import materials
from litgpt.args import EvalArgs, TrainArgs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.commands.generate_responses import generate_responses
from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data import StreamingSFT
from litgpt_akl.messages import say

WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
METHODS = {"cross-entropy": 0.0, "teacher beside it": 0.5, "teacher alone": 1.0}
"""By the share of the divergence in the loss."""
TRAIN = {"global_batch_size": 8, "micro_batch_size": 8, "epochs": None, "min_lr": 0.0, "max_norm": 1.0}
TRAIN |= {"lr_warmup_steps": 20}
HELD_OUT = 200
RESULTS = "results.json"


def write_records(out: Path, teacher: Path, samples: int) -> None:
    """Let the teacher write on from four words of a book; records that its own tokens cannot spell are left out."""
    prompts = [{"instruction": record["instruction"]} for record in materials.alice_passages()]
    materials.write_json(out / "prompts.json", prompts)
    written = out / "written.jsonl"
    options = {"samples": samples, "max_new_tokens": 70, "truncated": "keep", "batch_size": 64}
    generate_responses(teacher, data=StreamingSFT(str(out / "prompts.json"), num_proc=1), out=written, **options)
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    unknown, kept = tokenizer.token_to_id("<unk>"), []
    for line in written.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = record["output"]
        if text.strip() and unknown not in tokenizer.encode(text).ids and "<unk>" not in text:
            kept.append({"instruction": record["instruction"], "output": text})
    held_out = kept[:: len(kept) // HELD_OUT][:HELD_OUT]
    materials.write_json(out / "val.json", held_out)
    prompts_held_out = {record["instruction"] for record in held_out}
    # no prompt is in both
    materials.write_json(out / "train.json", [r for r in kept if r["instruction"] not in prompts_held_out])


def write_student(directory: Path, texts: list[str], seed: int) -> None:
    """A random student with a tokenizer of its own."""
    materials.write_student(directory, tied=True, seed=seed)
    for name in ("config.json", "generation_config.json"):
        (directory / name).unlink()
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 700, "special_tokens": ["<|endoftext|>"], "initial_alphabet": letters}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options, show_progress=False))
    tokenizer.save(str(directory / "tokenizer.json"))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "add_bos_token": False}
    materials.write_json(directory / "tokenizer_config.json", entries)


def train(out: Path, method: str, seed: int, steps: int) -> dict[str, float]:
    """Train one student; the cross-entropies of held-out records, in bits per byte of them."""
    student, run = out / f"student-{seed}", out / "runs" / f"{method.replace(' ', '-')}-{seed}"
    texts = [record["output"] for record in json.loads((out / "train.json").read_text(encoding="utf-8"))]
    if not student.exists():
        write_student(student, texts, seed)
    data = StreamingSFT(str(out / "train.json"), mask_prompt=True, val_path=str(out / "val.json"), num_workers=0)
    setup(
        student,
        teacher_checkpoint_dir=out / "teacher",
        data=data,
        out_dir=run,
        teacher=TeacherArgs(tokenizer="other", cache_dir=str(out / "cache")),
        distill=DistillArgs(divergence="fkl", kd_ratio=METHODS[method]),
        optimizer={"lr": 3e-3},
        train=TrainArgs(max_steps=steps, **TRAIN),
        eval=EvalArgs(
            interval=steps, max_iters=1000, max_new_tokens=None, initial_validation=False, final_validation=True
        ),
        overwrite=True,
        seed=seed,
    )
    log = max((run / "logs" / "csv").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with log.open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row.get("val_cross_entropy")][-1]
    nats = per_byte(out, student)
    names = {"student": "val_cross_entropy", "teacher": "val_teacher_cross_entropy", "agreement": "val_agreement"}
    found = {name: float(last[column]) for name, column in names.items()}
    return found | {name: found[name] * nats / math.log(2) for name in ("student", "teacher")}


def per_byte(out: Path, student: Path) -> float:
    """Response tokens of the held-out records, ends included, per byte of their responses."""
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    texts = [record["output"] for record in json.loads((out / "val.json").read_text(encoding="utf-8"))]
    return sum(len(tokenizer.encode(text).ids) + 1 for text in texts) / sum(len(text.encode()) for text in texts)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """In Markdown: each method with the mean over seeds, and its difference to cross-entropy, seed by seed."""
    lines = ["| method | seeds | bits per byte, student | teacher | less than cross-entropy alone, by seed |"]
    lines += ["|---|---|---|---|---|"]
    base = results["cross-entropy"]
    for method, runs in results.items():
        means = [statistics.fmean(run[role] for run in runs.values()) for role in ("student", "teacher")]
        less = ", ".join(f"{base[seed]['student'] - run['student']:+.4f}" for seed, run in runs.items() if seed in base)
        lines.append(f"| {method} | {len(runs)} | {means[0]:.4f} | {means[1]:.4f} | {less} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tokenizers"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=3, help="texts that the teacher writes for each of 601 prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    out, path = arguments.out, arguments.out / RESULTS
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "teacher").exists():
        materials.write_teacher(out / "teacher")
    if not (out / "train.json").exists():
        write_records(out, out / "teacher", arguments.samples)
    results = json.loads(path.read_text()) if path.exists() else {method: {} for method in METHODS}
    tasks = [(method, seed) for seed in arguments.seeds for method in METHODS]
    # what is asked first
    for method, seed in sorted(tasks, key=lambda task: METHODS[task[0]] == 1):
        if str(seed) not in results[method]:
            results[method][str(seed)] = train(out, method, seed, arguments.steps)
            materials.write_json(path, results)
    materials.write_json(out / "tokenizers.json", {"steps": arguments.steps, "results": results})
    (out / "tokenizers.md").write_text(table(results), encoding="utf-8")
    say(table(results))


if __name__ == "__main__":
    main()
