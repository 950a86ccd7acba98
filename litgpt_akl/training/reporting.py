"""What a run says while it goes on: its announcement, validations, an example, and the page."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from litgpt.utils import num_parameters, select_sft_generate_example
from torch import Tensor

from litgpt_akl.data.dataset import ArrowDataset, TokenizedDataset
from litgpt_akl.files.manifest import PAGE
from litgpt_akl.messages import reason, tell
from litgpt_akl.models.generation import generate, longest_prompt, without_end
from litgpt_akl.models.vocabulary import describe_padding
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.examples import keep_examples
from litgpt_akl.training.logging import flushed_metrics
from litgpt_akl.training.run import Run
from litgpt_akl.training.sample_text import describe_sample, tell_what_is_learnt
from litgpt_akl.training.validation import validate

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
