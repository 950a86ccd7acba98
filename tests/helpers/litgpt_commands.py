"""LitGPT's own commands, run as a user runs them, with the options of the tests."""

import sys
from pathlib import Path

from helpers.commands import complete

QUESTION = "Alice was beginning"


NEW_TOKENS = 12


LITGPT = Path(sys.executable).with_name("litgpt")


GREEDY = ("--top_k", "1", "--max_new_tokens", str(NEW_TOKENS), "--precision", "32-true")


def litgpt(*words: str | Path, directory: Path, stdin: str = "") -> str:
    """What a command prints; it must succeed."""
    finished = complete(words, stdin=stdin, directory=directory)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def training_options(alice_json: Path, learning_rate: float, max_steps: int) -> list[str]:
    data = f"--data JSON --data.json_path {alice_json} --data.mask_prompt true"
    sizes = f"--train.global_batch_size 4 --train.micro_batch_size 4 --train.max_steps {max_steps}"
    evaluation = "--eval.max_iters 1 --eval.max_new_tokens 2 --eval.final_validation false"
    words = f"{data} {sizes} {evaluation} --train.lr_warmup_steps 1 --data.num_workers 0 --precision 32-true".split()
    # LitGPT has no name for this style, loses the optimizer's class beside single init_args, and reads 1e-06 as text
    optimizer = f'{{"class_path": "torch.optim.AdamW", "init_args": {{"lr": {learning_rate:f}}}}}'
    return [*words, "--data.prompt_style", '{"class_path": "litgpt.prompts.Default"}', "--optimizer", optimizer]
