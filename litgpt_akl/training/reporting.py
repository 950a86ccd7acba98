"""What a run says while it goes on: its announcement, validations, examples of what both models say, and the page."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from litgpt.utils import num_parameters, select_sft_generate_example
from torch import Tensor

from litgpt_akl.data.dataset import ArrowDataset, TokenizedDataset
from litgpt_akl.data.steps import in_order, together
from litgpt_akl.files.manifest import EXAMPLES, PAGE
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.loss.divergences import in_head
from litgpt_akl.messages import reason, tell
from litgpt_akl.models.generation import generate, longest_prompt, without_end
from litgpt_akl.models.gpt import Head
from litgpt_akl.models.lora import without_adapters
from litgpt_akl.models.parallel import broadcast_object, reshard
from litgpt_akl.models.vocabulary import describe_padding
from litgpt_akl.report.runs import take_examples, write_examples
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.logging import flushed_metrics
from litgpt_akl.training.run import Run
from litgpt_akl.training.sample_text import describe_sample, tell_what_is_learnt
from litgpt_akl.training.validation import validate

RECORDS = 3
"""Of the validation data, from its first on."""
POSITIONS = 2
"""In each record's responses."""
TOKENS = 24
"""Shown of a distribution, the teacher's most probable first."""
CONTEXT = 20
"""Tokens shown before a position."""
PAGE_SECONDS = 10.0
"""Before the page is drawn again while a run goes on; it takes a second."""


def announce(fabric: L.Fabric, run: Run, state: dict) -> None:
    """A few lines that say what is about to happen."""
    for role, model in (("student", state["student"]), ("teacher", state["teacher"].model)):
        kept = "its LM head" if isinstance(model, HeadOnly) else f"{model.config.n_layer} layers"
        parameters = num_parameters(model) / 1e6
        fabric.print(f"{role.capitalize()}: {run.pair.directories[role]}, {kept}, {parameters:,.1f} M parameters")
    if padding := describe_padding(run.pair.student_config, state["student"].config.padded_vocab_size):
        fabric.print(f"{padding} The student is trained and written without them.")
    if run.lora.r is not None:
        trained, shares = num_parameters(state["student"], requires_grad=True) / 1e6, run.memory.shares_base
        fabric.print(
            f"LoRA: rank {run.lora.r} on {', '.join(run.lora.targets)}, {trained:,.2f} M parameters are trained"
            f"{'; the teacher is the base, held in memory once' if shares else ''}"
        )
    validation = state["validation_dataset"]
    for name, dataset in (("Training", state["dataset"]), ("Validation", validation)):
        fabric.print(f"{name}: {len(dataset):,} samples, {dataset.tokens:,} tokens")
    if fabric.is_global_zero:
        state["sample"] = describe_sample(run.data, state["dataset"], run.pair.tokenizer, run.stop)
        tell_what_is_learnt(state["sample"])
    if len(validation) == 0:
        fabric.print("There are no validation samples: validation is off.")
    kind = fabric.device.type
    fused = "compiled by torch.compile" if state["loss"].compiles_on(kind) else "eager"
    fabric.print(
        f"Loss: {run.distill.divergence}, kd_ratio {run.distill.kd_ratio}, {run.pair.vocab_size:,} ids,"
        f" {state['loss'].tokens_per_block(run.pair.vocab_size, kind)} tokens a block, element-wise part {fused}"
    )
    if run.distill.kd_ratio == 0:
        fabric.print("With kd_ratio 0 the loss is cross-entropy alone: the divergence is measured, and teaches nothing")
    if run.resume is not None:
        fabric.print(f"Resuming from {run.resume}, step {state['step_count']}")


def report(
    fabric: L.Fabric, run: Run, state: dict, with_example: bool = False, failures: list[str] | None = None
) -> None:
    """Validate, log, print, keep examples of what both models say, and refresh the page, unless it is new.

    With ``with_example`` also the student's response to a prompt is printed. What cannot be written is added to
    ``failures`` in process 0, or else told; they are given at the end of a run, when the page is refreshed in any case.
    """
    complain = tell if failures is None else failures.append
    if len(state["validation_dataset"]) > 0:
        metrics = validate(fabric, run, state)
        state["caches"].flush()
        if metrics is None:
            return
        fabric.log_dict(metrics, step=state["step_count"])
        if fabric.is_global_zero:
            tell(f"Step {state['step_count']}: {describe(metrics)}")
        if with_example and run.eval.max_new_tokens is not None:
            print_example(fabric, run, state)
        keep_examples(fabric, run, state, complain)
    if failures is not None or time.monotonic() - state["page_drawn"] >= PAGE_SECONDS:
        refresh_page(fabric, run, state, complain)


def describe(metrics: dict[str, float]) -> str:
    """One line for people."""
    closed = metrics["val_gap_closed"]
    return (
        f"cross-entropy {metrics['val_cross_entropy']:.3f} (teacher {metrics['val_teacher_cross_entropy']:.3f},"
        f" gap closed {'n/a' if math.isnan(closed) else f'{closed:.0%}'}), perplexity {metrics['val_ppl']:.2f},"
        f" divergence {metrics['val_divergence']:.3f}, forward KL {metrics['val_forward_kl']:.3f},"
        f" reverse KL {metrics['val_reverse_kl']:.3f}, agreement {metrics['val_agreement']:.1%}"
    )


def print_example(fabric: L.Fabric, run: Run, state: dict) -> None:
    """Print the prompt that was asked for and the student's response to it, if the student can read the prompt.

    All processes must ask together; the step seeds what is drawn.
    """
    student, tokenizer = state["student"], run.pair.tokenizer
    prompt = example_prompt(run.data, state["validation_dataset"], tokenizer, run.eval)
    if prompt is None or len(prompt) > longest_prompt(student.config):
        return
    options = {"max_new_tokens": run.eval.max_new_tokens, "stop": run.stop}
    options |= {"vocab_size": run.pair.vocab_size, "seeds": [(state["step_count"],)], "temperature": 0.8}
    # every process draws the same: a sharded model only runs in all of them together
    (response,) = generate(fabric, student, [prompt], **options)
    if fabric.is_global_zero:
        tell(f"{tokenizer.decode(torch.tensor([*prompt.tolist(), *without_end(response, options['stop'])]))}\n")


def example_prompt(data: DataModule, dataset: TokenizedDataset, tokenizer: Tokenizer, eval: EvalArgs) -> Tensor | None:
    """The ids of the prompt that ``eval.evaluate_example`` means; None if the data module shows none of its prompts."""
    wish = str(eval.evaluate_example)
    if isinstance(dataset, ArrowDataset):
        number = random.randrange(len(dataset)) if wish == "random" else int(wish) if wish.isdigit() else 0
        return dataset.prompt(min(number, len(dataset) - 1))
    if not hasattr(data, "test_dataset"):
        return None
    # the command line hands a number over as text
    eval = replace(eval, evaluate_example=int(wish) if wish.isdigit() else wish)
    return tokenizer.encode(data.prompt_style.apply(select_sft_generate_example(eval, data)))


def keep_examples(fabric: L.Fabric, run: Run, state: dict, complain: Callable[[str], None]) -> None:
    """Keep what teacher and student say now as the latest snapshot, and as the first one if there is none.

    All processes must ask together; process 0 writes, and tells ``complain`` if the disk does not take them. Training's
    random numbers are left as they were.
    """
    dataset = state["validation_dataset"]
    found = take_examples(run.out_dir, state["has_examples"], tell) if fabric.is_global_zero else None
    before = broadcast_object(found)
    records = run.validation_records(dataset)[:RECORDS]
    latest = {"step": state["step_count"], **_responses(fabric, run, state, dataset.read(records), before)}
    latest["positions"] = _positions(fabric, run, state, records)
    latest["sample"] = state["sample"]
    if fabric.is_global_zero:
        try:
            write_examples(run.out_dir, before["first"] if before else latest, latest)
            state["has_examples"] = True
        except OSError as error:
            complain(f"{run.out_dir / EXAMPLES} cannot be written ({reason(error)})")


def _responses(
    fabric: L.Fabric, run: Run, state: dict, samples: list[dict[str, Tensor]], before: dict[str, Any] | None
) -> dict[str, Any]:
    """Prompts, the teacher's responses, if it is there as a whole, and the student's."""
    none = {"prompts": [], "teacher_answers": None, "answers": []}
    if run.eval.max_new_tokens is None:
        return {**none, "note": "There are no example responses: --eval.max_new_tokens is null."}
    student, teacher, decode = state["student"], state["teacher"].model, run.pair.tokenizer.decode
    longest = min(longest_prompt(model.config) for model in (student, teacher))
    prompts = [prompt for prompt in map(_prompt, samples) if 0 < len(prompt) <= longest]
    if not prompts:
        return {**none, "note": "There are no example responses: the data masks no prompts, or they are too long."}
    found = {"prompts": [decode(prompt) for prompt in prompts], "teacher_answers": None, "note": ""}
    known = before and before["latest"]["teacher_answers"]
    if known and before["latest"]["prompts"] == found["prompts"]:
        found["teacher_answers"] = known
    elif isinstance(teacher, HeadOnly):
        found["note"] = "The teacher's responses are missing: only its LM head is loaded, the rest is cached."
    else:
        with without_adapters(teacher):
            found["teacher_answers"] = _generate(fabric, run, teacher, prompts)
    found["answers"] = _generate(fabric, run, student, prompts)
    return found


def _prompt(sample: dict[str, Tensor]) -> Tensor:
    """The ids before the first that counts."""
    counted = (sample["labels"] != IGNORE_INDEX).nonzero()
    return sample["input_ids"][: int(counted[0])] if len(counted) else sample["input_ids"]


def _generate(fabric: L.Fabric, run: Run, model: torch.nn.Module, prompts: list[Tensor]) -> list[str]:
    """What a model holds most probable, token by token."""
    tokenizer, stop = run.pair.tokenizer, run.stop
    options = {"max_new_tokens": run.eval.max_new_tokens, "stop": stop, "vocab_size": run.pair.vocab_size}
    responses: dict[int, list[int]] = {}
    for places in together(prompts, len(prompts), run.micro_batch[1]):
        found = generate(fabric, model, [prompts[place] for place in places], **options)
        responses.update(zip(places, found, strict=True))
    return [tokenizer.decode(torch.tensor(without_end(responses[place], stop))) for place in range(len(prompts))]


@torch.no_grad()
def _positions(fabric: L.Fabric, run: Run, state: dict, records: range) -> list[dict[str, Any]]:
    """Both models' distributions at positions spread over the responses of those records, the shortest first."""
    student, teacher, cache = state["student"], state["teacher"], state["caches"].validation
    student.eval()
    positions = []
    batches = list(in_order(state["validation_dataset"], records, *run.micro_batch, cache=cache))
    for batch, hidden in teacher.hidden_states(batches, cache):
        chosen = torch.tensor(_spread(batch.counts), dtype=torch.int64, device=fabric.device)
        places = batch.positions[chosen]
        with student.lm_head.output_of_head(partial(_both_logits, teacher.model, hidden[chosen], places)):
            teacher_logits, student_logits = student(batch.input_ids)
        reshard(teacher.model)
        teacher_p, student_p = (
            torch.softmax(logits[:, : run.pair.vocab_size].double().cpu() / run.distill.temperature, dim=-1)
            for logits in (teacher_logits, student_logits)
        )
        for place, label, p, q in zip(places.tolist(), batch.labels[chosen], teacher_p, student_p, strict=True):
            row, column = divmod(place, batch.input_ids.size(1))
            before = batch.input_ids[row, max(0, column + 1 - CONTEXT) : column + 1].cpu()
            positions.append(_describe(run, before, int(label), p, q))
    student.train()
    reshard(student.module)
    return positions


def _both_logits(teacher: torch.nn.Module, teacher_hidden: Tensor, places: Tensor, head: Head, hidden: Tensor) -> tuple:
    """What the student's forward gives: within it both heads are whole, also where teacher and student share one."""
    with without_adapters(teacher):
        # Fabric hands hidden states of half precision over in float32
        teacher_logits = teacher.lm_head.logits(teacher_hidden.to(teacher.lm_head.weight.dtype))
    return teacher_logits, head.logits(hidden.flatten(0, 1)[places])


def _spread(counts: list[int]) -> list[int]:
    """Indices of ``POSITIONS`` positions of each record, spread over those that it has."""
    chosen, start = set(), 0
    for count in counts:
        chosen |= {start + count * (2 * n + 1) // (2 * POSITIONS) for n in range(POSITIONS if count else 0)}
        start += count
    return sorted(chosen)


def _describe(run: Run, before: Tensor, label: int, p: Tensor, q: Tensor) -> dict[str, Any]:
    """A position as it is kept, after the ids ``before``; ``p`` and ``q`` are the distributions there, ``[vocab]``."""
    tokenizer, distill = run.pair.tokenizer, run.distill
    p, ids = p.sort(descending=True, stable=True)
    q = q[ids]
    head = in_head(p.cumsum(dim=-1), distill.mu, distill.head_rule)
    gaps, shown = (p - q).abs(), ids[:TOKENS]
    return {
        "context": tokenizer.decode(before),
        "next": _token_text(tokenizer, before, label),
        "tokens": [_token_text(tokenizer, before, id) for id in shown.tolist()],
        "p": p[:TOKENS].tolist(),
        "q": q[:TOKENS].tolist(),
        "others": len(p) - len(shown),
        "p_others": p[TOKENS:].sum().item(),
        "q_others": q[TOKENS:].sum().item(),
        "head": int(head.sum()),
        "head_mass": p[head].sum().item(),
        "head_gap": gaps[head].sum().item(),
        "tail_gap": gaps[~head].sum().item(),
    }


def _token_text(tokenizer: Tokenizer, before: Tensor, id: int) -> str:
    """What a token adds to the text before it: by itself it may lose the space that it begins with."""
    if id == tokenizer.eos_id:
        return "<end>"
    left, token = tokenizer.decode(before), torch.tensor([id])
    longer = tokenizer.decode(torch.cat((before, token)))
    text = longer.removeprefix(left) if longer.startswith(left) else tokenizer.decode(token)
    return text or f"<{id}>"


def refresh_page(fabric: L.Fabric, run: Run, state: dict, complain: Callable[[str], None]) -> None:
    """Write ``out_dir/report.html`` anew in process 0, if anything was logged; if it cannot be, the run goes on.

    Each file that cannot be shown is told once; ``complain`` is told if there is no new page.
    """
    metrics = flushed_metrics(fabric) if fabric.is_global_zero else None
    if metrics is None or not metrics.is_file():
        return
    state["page_drawn"] = time.monotonic()
    # Bokeh takes half a second to import, which a start is not to wait for
    from litgpt_akl.report.page import write_page
    from litgpt_akl.report.runs import read_run

    def tell_once(text: str) -> None:
        if text not in state["told_of_page"]:
            state["told_of_page"].add(text)
            tell(text)

    try:
        write_page(run.out_dir / PAGE, [read_run(run.out_dir, tell_once)])
    except Exception as error:
        # whatever it is, a page is not worth a run
        complain(f"{run.out_dir / PAGE} was not refreshed ({type(error).__name__}: {reason(error)})")
