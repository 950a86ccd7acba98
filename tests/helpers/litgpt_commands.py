"""LitGPT's own commands, run as a user runs them, with the options of the tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(checkpoint_dir: Path, directory: Path, timeout: float = 120) -> Iterator[Callable[[str], str]]:
    """What asks a server that is ready; it and all that it started are gone afterwards."""
    port = free_port()
    options = ("--accelerator", "cpu", "--devices", "1", "--port", str(port))
    with (directory / "server.log").open("w") as log:
        server = subprocess.Popen(
            [LITGPT, "serve", checkpoint_dir, *GREEDY, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            start_new_session=True,
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", time.monotonic() + timeout, directory)
        yield partial(_ask, f"http://127.0.0.1:{port}/predict")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


def wait_until_ready(server: subprocess.Popen, address: str, deadline: float, directory: Path) -> None:
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail((directory / "server.log").read_text()[-3000:])


def _ask(address: str, prompt: str) -> str:
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        found = json.load(response)
    assert found.keys() == {"output"}
    return found["output"]
