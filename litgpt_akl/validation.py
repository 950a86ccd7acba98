"""What held-out records say: the student's cross-entropy beside its teacher's, the divergence, an example answer."""

import math
from dataclasses import replace

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.generate.base import generate
from litgpt.tokenizer import Tokenizer
from litgpt.utils import select_sft_generate_example

from litgpt_akl.data import Store, window
from litgpt_akl.models import distillation_loss
from litgpt_akl.scoring import STATISTICS


@torch.no_grad()
def validate(fabric: L.Fabric, state: dict, store: Store, max_iters: int, micro_batch_size: int) -> dict[str, float]:
    """Means over the response tokens of the first ``max_iters`` micro-batches' worth of records.

    Returns:
        Nats per token: ``val_loss`` (the objective), ``val_cross_entropy``, ``val_teacher_cross_entropy``,
        ``val_divergence``, ``val_forward_kl``, ``val_reverse_kl``; ``val_ppl``; ``val_agreement`` of top-1 ids;
        ``val_gap_closed``, the share of the step-0 cross-entropy gap to the teacher that is closed by now
        (NaN if there was no gap, or no validation at the start).
    """
    student, teacher = state["student"], state["teacher"]
    records = range(min(len(store), max_iters * micro_batch_size))
    micro_batches, tokens = window(store, records, micro_batch_size)
    sums = torch.zeros(len(STATISTICS), device=fabric.device, dtype=torch.float64)
    loss = torch.zeros((), device=fabric.device, dtype=torch.float64)
    student.eval()
    for batch in micro_batches:
        batch = batch.to(fabric.device)
        result = distillation_loss(
            student, teacher, state["loss"], batch.input_ids, batch.positions, batch.labels, state["vocab_size"]
        )
        sums += torch.stack(list(result.stats.values()))
        loss += result.loss
    student.train()
    means = dict(zip(STATISTICS, (sums / tokens).tolist(), strict=True))
    cross_entropy, teacher_cross_entropy = means["cross_entropy"], means["teacher_cross_entropy"]
    if state["step_count"] == 0:
        state["start_cross_entropy"] = cross_entropy
    start = state.get("start_cross_entropy", math.nan)
    gap = start - teacher_cross_entropy
    return {
        "val_loss": loss.item() / tokens,
        "val_cross_entropy": cross_entropy,
        "val_teacher_cross_entropy": teacher_cross_entropy,
        "val_ppl": math.exp(min(cross_entropy, 700.0)),
        "val_divergence": means["divergence"],
        "val_forward_kl": means["forward_kl"],
        "val_reverse_kl": means["reverse_kl"],
        "val_agreement": means["agreement"],
        "val_gap_closed": (start - cross_entropy) / gap if gap > 0 else math.nan,
    }


def describe(metrics: dict[str, float]) -> str:
    """One line for people."""
    closed = metrics["val_gap_closed"]
    return (
        f"cross-entropy {metrics['val_cross_entropy']:.3f} (teacher {metrics['val_teacher_cross_entropy']:.3f},"
        f" gap closed {'n/a' if math.isnan(closed) else f'{closed:.0%}'}), perplexity {metrics['val_ppl']:.2f},"
        f" divergence {metrics['val_divergence']:.3f}, forward KL {metrics['val_forward_kl']:.3f},"
        f" reverse KL {metrics['val_reverse_kl']:.3f}, agreement {metrics['val_agreement']:.1%}"
    )


@torch.no_grad()
def example_answer(
    fabric: L.Fabric, model: torch.nn.Module, tokenizer: Tokenizer, data: DataModule, eval: EvalArgs
) -> str | None:
    """A prompt of the data and the model's answer to it, or None if the data module shows none of its prompts.

    The prompt and up to ``eval.max_new_tokens`` more tokens have to fit into the model's context; training's random
    numbers are left as they were.
    """
    if not hasattr(data, "test_dataset") or eval.max_new_tokens is None:
        return None
    if str(eval.evaluate_example).isdigit():
        # the command line hands a number over as text
        eval = replace(eval, evaluate_example=int(eval.evaluate_example))
    prompt = data.prompt_style.apply(select_sft_generate_example(eval, data))
    input_ids = tokenizer.encode(prompt, device=fabric.device)
    context_length = model.config.block_size
    longest = min(len(input_ids) + eval.max_new_tokens, context_length)
    if longest <= len(input_ids):
        return None
    model.eval()
    with torch.random.fork_rng(), fabric.init_tensor():
        model.max_seq_length = longest
        model.set_kv_cache(batch_size=1)
        output = generate(model, input_ids, max_returned_tokens=longest, temperature=0.8, eos_id=tokenizer.eos_id)
    model.clear_kv_cache()
    model.max_seq_length = context_length
    model.train()
    return tokenizer.decode(output)
