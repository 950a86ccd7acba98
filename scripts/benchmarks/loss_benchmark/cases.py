"""What the benchmark of the loss times: this package, the floor, the formula as published, and the peers' losses.

A case is made from inputs and gives a function of nothing that goes forward and backward once. The peers' run in a
virtual environment without this package.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def make_inputs(
    tokens: int,
    vocab: int,
    student_width: int,
    teacher_width: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Hidden states and heads whose logits look like a language model's: a Zipf prior and one favoured id per token."""
    generator = torch.Generator(device).manual_seed(0)
    made = {"generator": generator, "device": device}
    labels = torch.randint(0, vocab, (tokens,), **made)
    inputs = {"labels": labels}
    for side, width, confidence in (("student", student_width, 10.0), ("teacher", teacher_width, 13.0)):
        weight = torch.randn(vocab, width, **made).div_(width**0.5)
        weight[:, 0] = -1.2 * torch.arange(1, vocab + 1, device=device).log()
        hidden = torch.randn(tokens, width, **made)
        strength = confidence + 3 * torch.randn(tokens, 1, **made)
        hidden[:, 1:] += strength * weight[labels, 1:]
        hidden[:, 0] = 1
        inputs[f"{side}_hidden"], inputs[f"{side}_head_weight"] = hidden.to(dtype), weight.to(dtype)
    for name in ("student_hidden", "student_head_weight"):
        inputs[name].requires_grad_()
    return inputs


def products(inputs: dict) -> Callable[[], None]:
    student, teacher = inputs["student_hidden"].detach(), inputs["teacher_hidden"]
    head = inputs["student_head_weight"].detach()

    def run():
        student_logits = torch.mm(student, head.T)
        torch.mm(teacher, inputs["teacher_head_weight"].T)
        torch.mm(student_logits, head)
        torch.mm(student_logits.T, student)

    return run


def ours(inputs: dict, divergence: str = "akl", compile: bool = True) -> Callable[[], None]:
    from litgpt_akl import DistillationLoss

    loss = DistillationLoss(divergence=divergence, kd_ratio=0.5, compile=compile)

    def run():
        loss(**inputs).loss.backward()

    return run


def eager(inputs: dict, divergence: str = "akl") -> Callable[[], None]:
    return ours(inputs, divergence, compile=False)


def direct(inputs: dict) -> Callable[[], None]:
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


def liger(inputs: dict) -> Callable[[], None]:
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


def torchtune(inputs: dict) -> Callable[[], None]:
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    loss = ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

    def run():
        chunks = [
            [rows[None] @ inputs[f"{side}_head_weight"].T for rows in inputs[f"{side}_hidden"].chunk(8)]
            for side in ("student", "teacher")
        ]
        loss(*chunks, inputs["labels"][None]).backward()

    return run


def trl(inputs: dict) -> Callable[[], None]:
    from trl.trainer.distillation_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_divergence_loss

    def run():
        loss, *_ = _chunked_divergence_loss(
            inputs["student_hidden"][None],
            inputs["teacher_hidden"][None],
            inputs["student_head_weight"],
            inputs["teacher_head_weight"],
            torch.ones_like(inputs["labels"])[None],
            beta=0.5,
            chunk_size=_CHUNKED_LM_HEAD_CHUNK_SIZE,
        )
        loss.backward()

    return run


CASES = {f.__name__: f for f in (products, ours, eager, direct, liger, torchtune, trl)}


def own_forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """A divergence as a user would write it: ``[n, vocab]`` twice -> ``[n]`` nats, differentiated by PyTorch."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
