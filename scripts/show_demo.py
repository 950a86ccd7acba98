"""What the demo's training did: held-out numbers before and after, answers side by side, one question over HTTP."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests
from litgpt import LLM
from litgpt.utils import CLI

ROWS = {
    "val_forward_kl": "forward KL to the teacher, nats a token",
    "val_reverse_kl": "reverse KL to the teacher, nats a token",
    "val_agreement": "share of tokens with the teacher's top-1 id",
    "val_cross_entropy": "cross-entropy of the human answers, nats a token",
}


def show_demo(
    *, teacher: Path, student: Path, run: Path, data: Path, answers: int = 3, max_new_tokens: int = 40
) -> None:
    """Print what a run did.

    Args:
        teacher: The teacher's checkpoint directory.
        student: The trained student's.
        run: The run's ``out_dir``.
        data: Held-out records, a JSON list.
        answers: How many questions both models answer.
        max_new_tokens: Length of an answer.
    """
    print_before_and_after(run)
    instructions = [record["instruction"] for record in json.loads(data.read_text(encoding="utf-8"))]
    questions = [text for text in instructions if len(text.split()) >= 4][:answers]
    replies = {
        name: answer(path, questions, max_new_tokens) for name, path in (("teacher", teacher), ("student", student))
    }
    for number, question in enumerate(questions):
        print(f"\nQuestion: {question}")
        for name, texts in replies.items():
            print(f"  {name}: {texts[number]}")
    ask_server(student, questions[0])


def print_before_and_after(run: Path) -> None:
    """The first and the last validation of the run's newest log."""
    log = max(run.glob("logs/csv/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with log.open(newline="", encoding="utf-8") as file:
        validations = [row for row in csv.DictReader(file) if row.get("val_forward_kl")]
    first, last = validations[0], validations[-1]
    print(
        f"\nHeld-out records, before and after {last['step']} steps:\n\n{'':52}{'before':>9}{'after':>9}{'teacher':>9}"
    )
    for name, text in ROWS.items():
        teacher = f"{float(last['val_teacher_cross_entropy']):9.3f}" if name == "val_cross_entropy" else ""
        print(f"{text:52}{float(first[name]):9.3f}{float(last[name]):9.3f}{teacher}")
    fall = 1 - float(last["val_forward_kl"]) / float(first["val_forward_kl"])
    print(f"\nForward KL fell by {fall:.1%}.")


def answer(checkpoint_dir: Path, questions: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers, in float32."""
    llm = LLM.load(str(checkpoint_dir), distribute=None)
    llm.distribute(accelerator="auto", devices=1, precision="32-true")
    return [" ".join(llm.generate(text, max_new_tokens=max_new_tokens, top_k=1).split()) for text in questions]


def ask_server(student: Path, question: str) -> None:
    """Start ``litgpt serve`` on the loopback address, ask one question, end the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).with_name("litgpt"),
        "serve",
        student,
        "--port",
        str(port),
        "--precision",
        "32-true",
    ]
    print(f"\nlitgpt serve {student} --port {port}")
    log_path = student.parent / "serve.log"
    with log_path.open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--timeout", "60"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        reply = _post_when_ready(server, f"http://127.0.0.1:{port}", {"prompt": question})
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
    if reply is None:
        raise SystemExit(f"The server did not answer within 120 s; its output is in {log_path}")
    print(f"  asked over HTTP: {question}\n  answer: {' '.join(reply['output'].split())}")


def _post_when_ready(server: subprocess.Popen, address: str, request: dict) -> dict | None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return requests.post(f"{address}/predict", json=request, timeout=60).json()
        except requests.ConnectionError:
            pass
        time.sleep(0.5)
    return None


if __name__ == "__main__":
    CLI(show_demo)
