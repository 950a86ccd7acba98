"""torchtune's distillation on a job: the step of its recipe, which itself trains adapters only, on all weights."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torchtune.data import padded_collate_sft
from torchtune.models.qwen2 import qwen2, qwen2_hf_to_tune
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss
from torchtune.training import scale_grads

from step_benchmark.job import IGNORED, LEARNING_RATE, THREADS, Job, memory_gb, report
from step_benchmark.peer_logits import check_logits

KD_RATIO = 0.5


def load(directory: str) -> TransformerDecoder:
    """The model by torchtune's own builder for Qwen2, which is Llama with biases; those that are not there go."""
    config = json.loads((Path(directory) / "config.json").read_text())
    weights = torch.load(Path(directory) / "pytorch_model.bin", weights_only=True, mmap=True)
    sizes = {"num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"]}
    model = qwen2(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=2048,
        norm_eps=config["rms_norm_eps"],
        rope_base=config["rope_theta"],
        tie_word_embeddings=True,
        **sizes,
    )
    converted = qwen2_hf_to_tune(weights, dim=config["hidden_size"], tie_word_embeddings=True, **sizes)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None and f"{name}.bias" not in converted:
            module.bias = None
    model.load_state_dict(converted)
    return model


def loss_of(
    student: TransformerDecoder, teacher: TransformerDecoder, losses: tuple, batch: dict[str, Tensor]
) -> Tensor:
    tokens, labels = batch["tokens"], batch["labels"]
    logits = student(tokens)
    with torch.no_grad():
        teacher_logits = teacher(tokens)
    labels = torch.hstack((labels[..., 1:], torch.full((len(labels), 1), IGNORED)))
    divergence, cross_entropy = losses
    kd_loss, class_loss = divergence(logits, teacher_logits, labels), cross_entropy(logits, labels)
    return (1 - KD_RATIO) * class_loss + KD_RATIO * kd_loss


def main(job: Job) -> None:
    torch.set_num_threads(THREADS)
    empty, seconds = memory_gb("VmRSS"), []
    student, teacher = load(job.hf_student), load(job.hf_teacher).requires_grad_(False).eval()
    difference = check_logits(job, {"student": student, "teacher": teacher})
    losses = ForwardKLWithChunkedOutputLoss(), CEWithChunkedOutputLoss()
    for model in (student, teacher):
        model.set_num_output_chunks(losses[0].num_output_chunks)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    for rows in job.steps:
        start = time.perf_counter()
        batch = padded_collate_sft([{"tokens": row["input_ids"], "labels": row["labels"]} for row in rows])
        counted = (batch["labels"] != IGNORED).sum()
        (loss_of(student, teacher, losses, batch) * counted).backward()
        scale_grads(student, 1 / counted)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    settings = (
        "forward KL and cross-entropy, half each, in 8 chunks, temperature 1, padded on the right, no gradient clipping"
    )
    report(
        job, seconds, empty, f"torchtune {version('torchtune')}, torch {torch.__version__}; {settings}; {difference}"
    )


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
