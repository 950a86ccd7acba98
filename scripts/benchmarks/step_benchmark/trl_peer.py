"""TRL's trainers on a job: ``python -m step_benchmark.trl_peer trl_gkd|trl_distillation JOB``."""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from step_benchmark.job import IGNORED, LEARNING_RATE, ROWS, SEED, THREADS, Job, memory_gb, report
from step_benchmark.peer_logits import check_logits

COMMON = {
    "per_device_train_batch_size": ROWS,
    "learning_rate": LEARNING_RATE,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": SEED,
}


class Clock(TrainerCallback):
    """The seconds of each step, fetching its rows included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_, **__) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Recorded(DistillationTrainer):
    """In place of what the student would write, the recorded responses; a prompt is the number of a row."""

    rows: list[tuple[list[int], list[int]]] = []

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        self.numbers = [int(prompt) for prompt in prompts]
        return [self.rows[number][0] for number in self.numbers], None, {}

    def _generate_single_turn(self, *_, **__) -> list[list[int]]:
        return [self.rows[number][1] for number in self.numbers]


def split(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt and response."""
    prompt = sum(label == IGNORED for label in row["labels"])
    return row["input_ids"][:prompt], row["input_ids"][prompt:]


def gkd(job: Job, models: dict, tokenizer: PreTrainedTokenizerFast, clock: Clock, out: str) -> str:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    masks = [[int(label != IGNORED) for label in row["labels"]] for row in job.rows]
    columns = {"prompt": [""] * len(masks), "input_ids": [row["input_ids"] for row in job.rows]}
    arguments = GKDConfig(output_dir=out, max_steps=len(job.steps), lmbda=0.0, beta=0.0, **COMMON)
    InOrder(
        model=models["student"],
        teacher_model=models["teacher"],
        args=arguments,
        train_dataset=Dataset.from_dict({**columns, "completion_mask": masks}),
        processing_class=tokenizer,
        callbacks=[clock],
    ).train()
    return f"lmbda 0, beta 0 (forward KL), temperature 1, padded on the left, {arguments.optim.value}"


def distillation(job: Job, models: dict, tokenizer: PreTrainedTokenizerFast, clock: Clock, out: str) -> str:
    Recorded.rows = [split(row) for row in job.rows]
    arguments = DistillationConfig(
        output_dir=out, max_steps=len(job.steps), shuffle_dataset=False, beta=0.0, temperature=1.0, **COMMON
    )
    Recorded(
        model=models["student"],
        teacher_model=models["teacher"],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(job.rows))]}),
        processing_class=tokenizer,
        callbacks=[clock],
    ).train()
    return (
        "made for responses that the student writes, given the recorded ones here; chunked loss,"
        f" beta 0 (forward KL), temperature 1, prompts padded on the left, {arguments.optim.value}"
    )


RUNNERS = {"trl_gkd": gkd, "trl_distillation": distillation}


def main(name: str, job: Job) -> None:
    torch.set_num_threads(THREADS)
    empty, clock = memory_gb("VmRSS"), Clock()
    directories = {"student": job.hf_student, "teacher": job.hf_teacher}
    models = {
        role: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for role, directory in directories.items()
    }
    difference = check_logits(job, {role: lambda ids, m=model: m(ids).logits for role, model in models.items()})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job.hf_student)
    with tempfile.TemporaryDirectory() as out:
        settings = RUNNERS[name](job, models, tokenizer, clock, out)
    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    report(job, clock.seconds, empty, f"{versions}; {settings}, gradient clipping at norm 1; {difference}")


if __name__ == "__main__":
    main(sys.argv[1], Job.read(Path(sys.argv[2])))
