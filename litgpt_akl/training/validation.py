"""What held-out records say: the student's cross-entropy beside its teacher's, the divergence, an example answer."""

import math
import random
from dataclasses import replace

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from litgpt.utils import select_sft_generate_example
from torch import Tensor

from litgpt_akl.data.arrow_store import ArrowStore
from litgpt_akl.data.dataset import Store
from litgpt_akl.loss.scoring import STATISTICS
from litgpt_akl.models.generation import generate, longest_prompt, stop_sequences, without_end
from litgpt_akl.models.gpt import distillation_loss
from litgpt_akl.models.pair import Pair
from litgpt_akl.models.parallel import reshard
from litgpt_akl.training.run import Run, validation_batches
from litgpt_akl.training.signals import StopSignals


@torch.no_grad()
def validate(fabric: L.Fabric, run: Run, state: dict, store: Store, stop: StopSignals) -> dict[str, float] | None:
    """Means over the response tokens of the first ``max_iters`` micro-batches' worth of records.

    Returns:
        None if a stop signal came, else:
        Nats per token: ``val_loss`` (the objective), ``val_cross_entropy``, ``val_teacher_cross_entropy``,
        ``val_divergence``, ``val_forward_kl``, ``val_reverse_kl``; ``val_ppl``; ``val_agreement`` of top-1 ids;
        ``val_gap_closed``, the share of the step-0 cross-entropy gap to the teacher that is closed by now
        (NaN if there was no gap, or no validation at the start).
    """
    student, teacher, cache = state["student"], state["teacher"], state["caches"].validation
    # loss, response tokens, statistics
    sums = torch.zeros(2 + len(STATISTICS), device=fabric.device, dtype=torch.float64)
    student.eval()
    for batch in validation_batches(fabric, run, store, cache):
        if stopped := stop.agreed(fabric) is not None:
            break
        for moved, teacher_hidden in teacher.answers([batch], cache):
            targets = moved.input_ids, moved.positions, moved.labels, teacher_hidden
            result = distillation_loss(student, teacher.model, state["loss"], *targets, state["vocab_size"])
            sums += torch.stack([result.loss, result.loss.new_tensor(result.tokens), *result.stats.values()])
    student.train()
    reshard(student.module)
    if stopped:
        return None
    loss, tokens, *sums = fabric.all_reduce(sums, reduce_op="sum").tolist()
    means = {name: value / tokens for name, value in zip(STATISTICS, sums, strict=True)}
    cross_entropy, teacher_cross_entropy = means["cross_entropy"], means["teacher_cross_entropy"]
    state.update(last_validation=state["step_count"], validation_loss=loss / tokens)
    if state["step_count"] == 0:
        state["start_cross_entropy"] = cross_entropy
    start = state.get("start_cross_entropy", math.nan)
    gap = start - teacher_cross_entropy
    return {
        "val_loss": state["validation_loss"],
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


def example_prompt(data: DataModule, store: Store, tokenizer: Tokenizer, eval: EvalArgs) -> Tensor | None:
    """The ids of the prompt that ``eval.evaluate_example`` means; None if the data module shows none of its prompts."""
    wish = str(eval.evaluate_example)
    if isinstance(store, ArrowStore):
        number = random.randrange(len(store)) if wish == "random" else int(wish) if wish.isdigit() else 0
        return store.prompt(min(number, len(store) - 1))
    if not hasattr(data, "test_dataset"):
        return None
    # the command line hands a number over as text
    eval = replace(eval, evaluate_example=int(wish) if wish.isdigit() else wish)
    return tokenizer.encode(data.prompt_style.apply(select_sft_generate_example(eval, data)))


def example_answer(
    fabric: L.Fabric, model: torch.nn.Module, pair: Pair, input_ids: Tensor, max_new_tokens: int, step: int
) -> str | None:
    """A prompt ``[time]`` and the model's answer to it, or None if the model cannot read so long a prompt.

    All processes must ask together; ``step`` seeds what is drawn.
    """
    if len(input_ids) > longest_prompt(model.config):
        return None
    stop = stop_sequences(pair.tokenizer, None)
    # every process draws the same: a sharded model only runs in all of them together
    (answer,) = generate(
        fabric,
        model,
        [input_ids],
        max_new_tokens=max_new_tokens,
        stop=stop,
        vocab_size=pair.vocab_size,
        seeds=[(step,)],
        temperature=0.8,
    )
    return pair.tokenizer.decode(torch.tensor([*input_ids.tolist(), *without_end(answer, stop)]))
