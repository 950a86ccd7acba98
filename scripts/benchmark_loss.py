"""Time and peak memory of the loss over two LM heads, forward and backward, as ratios measured in one run.

Each case runs in a fresh process; the cases of a round follow each other, and ratios are medians over rounds. The floor
is the four matrix products that no implementation can avoid: both models' logits, and the gradients of the student's
hidden states and head. `direct` is the formula as published: whole logits, a full sort, autograd.
`--peers` adds the chunked losses of liger-kernel and torchtune, installed into a virtual environment of their own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "small": {"tokens": 1024, "vocab": 49_152, "student_width": 576, "teacher_width": 576},
    "wide": {"tokens": 256, "vocab": 151_936, "student_width": 896, "teacher_width": 3584},
}
PEERS_ENVIRONMENT = Path(__file__).parent.parent / ".venv-peers"


def make_inputs(tokens: int, vocab: int, student_width: int, teacher_width: int) -> dict:
    """Hidden states and heads whose logits look like a language model's: a Zipf prior and one favoured id per token."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    inputs = {"labels": labels}
    for side, width, confidence in (("student", student_width, 10.0), ("teacher", teacher_width, 13.0)):
        weight = torch.randn(vocab, width, generator=generator).div_(width**0.5)
        weight[:, 0] = -1.2 * torch.arange(1, vocab + 1).log()
        hidden = torch.randn(tokens, width, generator=generator)
        strength = confidence + 3 * torch.randn(tokens, 1, generator=generator)
        hidden[:, 1:] += strength * weight[labels, 1:]
        hidden[:, 0] = 1
        inputs[f"{side}_hidden"], inputs[f"{side}_head_weight"] = hidden, weight
    for name in ("student_hidden", "student_head_weight"):
        inputs[name].requires_grad_()
    return inputs


def products(inputs: dict):
    import torch

    student, teacher = inputs["student_hidden"].detach(), inputs["teacher_hidden"]
    head = inputs["student_head_weight"].detach()

    def run():
        student_logits = torch.mm(student, head.T)
        torch.mm(teacher, inputs["teacher_head_weight"].T)
        torch.mm(student_logits, head)
        torch.mm(student_logits.T, student)

    return run


def ours(inputs: dict, compile: bool = True):
    from litgpt_akl import DistillationLoss

    loss = DistillationLoss(divergence="akl", kd_ratio=0.5, compile=compile)

    def run():
        loss(**inputs).loss.backward()

    return run


def eager(inputs: dict):
    return ours(inputs, compile=False)


def direct(inputs: dict):
    import torch

    def run():
        student_logits = inputs["student_hidden"] @ inputs["student_head_weight"].T
        teacher_logits = inputs["teacher_hidden"] @ inputs["teacher_head_weight"].T
        log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        with torch.no_grad():
            sorted_p, order = p.sort(dim=-1, descending=True)
            before = sorted_p.cumsum(-1) - sorted_p
            gap = (p - q).abs().gather(-1, order)
            h = (gap * (before < 0.5)).sum(-1) / gap.sum(-1)
        forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        cross_entropy = torch.nn.functional.cross_entropy(student_logits, inputs["labels"], reduction="sum")
        (0.5 * (h * forward + (1 - h) * reverse).sum() + 0.5 * cross_entropy).backward()

    return run


def liger(inputs: dict):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, chunk_size=256)

    def run():
        loss(
            inputs["student_hidden"],
            inputs["student_head_weight"],
            inputs["teacher_hidden"],
            inputs["teacher_head_weight"],
            inputs["labels"],
        ).backward()

    return run


def torchtune(inputs: dict):
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    loss = ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

    def run():
        chunks = [
            [rows[None] @ inputs[f"{side}_head_weight"].T for rows in inputs[f"{side}_hidden"].chunk(8)]
            for side in ("student", "teacher")
        ]
        loss(*chunks, inputs["labels"][None]).backward()

    return run


CASES = {f.__name__: f for f in (products, ours, eager, direct, liger, torchtune)}


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run_case(case: str, shape: dict, repetitions: int) -> None:
    """Print, as JSON, the median seconds of a call and the peak MiB beyond inputs and their gradients."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    small = CASES[case](make_inputs(**{**shape, "tokens": 2, "vocab": 512}))
    small()
    inputs = make_inputs(**shape)
    run = CASES[case](inputs)
    leaves = [x for x in inputs.values() if x.requires_grad]
    before, seconds = memory_mib("VmRSS"), []
    gradients = sum(x.numel() * x.element_size() for x in leaves) / 2**20
    for repetition in range(repetitions + 1):
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        run()
        if repetition > 0:
            seconds.append(time.perf_counter() - start)
    peak = memory_mib("VmHWM") - before - gradients
    print(json.dumps({"seconds": statistics.median(seconds), "peak": max(peak, 0.0)}))


def measure(case: str, shape: dict, repetitions: int) -> dict:
    python = PEERS_ENVIRONMENT / "bin/python" if case in ("liger", "torchtune") else sys.executable
    command = [python, __file__, "--case", case, "--shape", json.dumps(shape), "--repetitions", str(repetitions)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if result.returncode:
        raise SystemExit(f"{case} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def compare_cases(name: str, shape: dict, cases: list[str], rounds: int, repetitions: int) -> None:
    results: dict[str, list[dict]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            print(f"\r{name}: round {number + 1} of {rounds}, {case:10}", end="", file=sys.stderr, flush=True)
            results[case].append(measure(case, shape, repetitions))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    print(f"\n{name}: " + ", ".join(f"{key} {value:,}" for key, value in shape.items()))
    print(f"{'case':12}{'seconds':>9}{'/ products':>12}{'direct / it':>13}{'peak MiB':>10}{'/ direct':>10}")
    for case in cases:
        seconds = statistics.median(r["seconds"] for r in results[case])
        peak = statistics.median(r["peak"] for r in results[case])
        ratios = [
            [a["seconds"] / b["seconds"] for a, b in zip(results[case], results["products"], strict=True)],
            [b["seconds"] / a["seconds"] for a, b in zip(results[case], results["direct"], strict=True)],
            [a["peak"] / b["peak"] for a, b in zip(results[case], results["direct"], strict=True)],
        ]
        to_products, direct_to_it, memory = (statistics.median(r) for r in ratios)
        print(f"{case:12}{seconds:9.3f}{to_products:12.2f}{direct_to_it:13.2f}{peak:10.0f}{memory:10.2f}")


def memory_by_tokens(shape: dict) -> None:
    peaks = {n: measure("ours", {**shape, "tokens": n}, 1)["peak"] for n in (256, 1024, 4096)}
    print("\npeak MiB of ours beyond inputs and gradients by tokens: " + str({n: round(p) for n, p in peaks.items()}))


def install_peers() -> None:
    """Make the peers' virtual environment once, with the torch that is installed here."""
    import torch

    if PEERS_ENVIRONMENT.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", PEERS_ENVIRONMENT], check=True)
    version = torch.__version__.split("+")[0]
    for packages in ([f"torch=={version}"], ["liger-kernel", "torchtune", "torchao==0.9.0", f"torch=={version}"]):
        subprocess.run([PEERS_ENVIRONMENT / "bin/pip", "install", "-q", *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all cases (default: 3)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls in each process (default: 5)")
    parser.add_argument("--only", choices=SHAPES, help="measure this shape only")
    parser.add_argument("--peers", action="store_true", help="add liger-kernel and torchtune")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return run_case(arguments.case, arguments.shape, arguments.repetitions)
    import torch

    cases = ["products", "ours", "eager", "direct"]
    if arguments.peers:
        install_peers()
        cases += ["liger", "torchtune"]
    cores = len(os.sched_getaffinity(0))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {cores} cores, {time.strftime('%Y-%m-%d')}")
    for name, shape in SHAPES.items():
        if arguments.only in (None, name):
            compare_cases(name, shape, cases, arguments.rounds, arguments.repetitions)
    memory_by_tokens(SHAPES["small"])


if __name__ == "__main__":
    main()
