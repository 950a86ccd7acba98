"""What a run says while it goes on: validations, examples of what both models say, and the page."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from os.path import commonprefix
from typing import NamedTuple

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from litgpt.utils import select_sft_generate_example
from torch import Tensor

from litgpt_akl.data.dataset import ArrowDataset, TokenizedDataset
from litgpt_akl.files.manifest import MANIFEST, PAGE, newest_first
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import CONTROL, entry, reason, tell
from litgpt_akl.models.generation import generate, longest_prompt, without_end
from litgpt_akl.models.lora import without_adapters
from litgpt_akl.models.several import each_model
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.examples import keep_examples
from litgpt_akl.training.launch import STOP_SIGNALS, is_loss_of_another
from litgpt_akl.training.logging import flushed_metrics
from litgpt_akl.training.run import Run
from litgpt_akl.training.teacher_accuracy import doubt_teacher
from litgpt_akl.training.validation import validate

SHOWN = 300
"""Characters of an example that is printed."""
PAGE_SECONDS = 10.0
"""Before the page is drawn again while a run goes on; it takes a second."""


def report(
    fabric: L.Fabric, run: Run, state: dict, with_example: bool = False, failures: list[str] | None = None
) -> None:
    """Validate, log, print, keep examples of what both models say, and refresh the page, unless it is new.

    With ``with_example`` also responses to a prompt are printed. What cannot be written is added to
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
            tell_validation(state["step_count"], metrics)
            doubt_teacher(run, state, metrics["val_teacher_cross_entropy"])
        if with_example and run.eval.max_new_tokens is not None:
            tell_example(fabric, run, state)
        keep_examples(fabric, run, state, complain)
    if failures is not None or time.monotonic() - state["page_drawn"] >= PAGE_SECONDS:
        refresh_page(fabric, run, state, complain, goes_on=failures is None)


def tell_validation(step: int, metrics: dict[str, float]) -> None:
    """Two lines for people, in columns of one width."""
    kinds = {"forward KL": "forward_kl", "reverse KL": "reverse_kl", "divergence": "divergence"}
    distances = "  ".join(f"{name} {metrics[f'val_{key}']:6.3f}" for name, key in kinds.items())
    others = f"cross-entropy {metrics['val_cross_entropy']:6.3f}  agreement {metrics['val_agreement']:6.1%}"
    if math.isfinite(closed := metrics["val_gap_closed"]):
        # a student that fits the records better than its teacher has no gap left
        others += f"  gap closed {closed:5.0%}" if closed <= 1 else "  gap closed >100%"
    entry(f"Step {step:>4}", f"{distances}\n{others}")


def tell_example(fabric: L.Fabric, run: Run, state: dict) -> None:
    """Print the prompt that was asked for, with the recorded response and both models' most probable ones.

    Nothing is printed if a model cannot read it. The teacher is asked once, and not if its LM head alone is loaded, or
    it has another tokenizer, or there are several. All processes must ask together.
    """
    student, teacher, dataset = state["student"], state["teacher"].model, state["validation_dataset"]
    decode = run.pair.tokenizer.decode
    example = find_example(run.data, dataset, run.pair.tokenizer, run.eval)
    models = each_model(teacher)
    if example is None or len(example.prompt) > min(longest_prompt(model.config) for model in (student, *models)):
        return
    options = {"max_new_tokens": run.eval.max_new_tokens, "stop": run.stop, "vocab_size": run.pair.vocab_size}
    prompt, answers = tuple(example.prompt.tolist()), state["teacher_answers"]
    is_asked = run.pair.teacher_tokenizer is None and len(models) == 1
    if prompt not in answers and is_asked and not isinstance(teacher, HeadOnly):
        with without_adapters(teacher):
            # every process asks the same: a sharded model only runs in all of them together
            answers[prompt] = generate(fabric, teacher, [example.prompt], **options)[0]
    (answer,) = generate(fabric, student, [example.prompt], **options)
    if fabric.is_global_zero:
        entry("  Prompt", plain_text(without_frame(decode(example.prompt), *map(decode, example.other))))
        for label, ids in (("Recorded", example.response), ("Teacher", answers.get(prompt)), ("Student", answer)):
            if ids is not None:
                text = plain_text(decode(torch.tensor(without_end(ids, run.stop), dtype=torch.int64)))
                entry(f"  {label}", text or "(nothing)")


def plain_text(text: str) -> str:
    """One line of at most ``SHOWN`` characters of what a model reads or writes, without what controls a terminal."""
    text = " ".join(CONTROL.sub("", text).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"


def without_frame(text: str, *others: str) -> str:
    """A prompt without the lines at its begin and its end that other prompts have, too: those that a form writes."""
    if not others or text in others:
        return text
    before, after = commonprefix([text, *others]), commonprefix([each[::-1] for each in (text, *others)])
    # a line that only begins alike is not the form's
    inner = text[before.rfind("\n") + 1 : len(text) - after.rfind("\n") - 1]
    return inner if inner.strip() else text


class Example(NamedTuple):
    """A prompt, ``[time]``, with the ids of the recorded response, if it is known, and another prompt, if there is."""

    prompt: Tensor
    response: list[int] | None = None
    other: tuple[Tensor, ...] = ()


def find_example(data: DataModule, dataset: TokenizedDataset, tokenizer: Tokenizer, eval: EvalArgs) -> Example | None:
    """That which ``eval.evaluate_example`` means; None if the data module shows none of its prompts."""
    wish = str(eval.evaluate_example)
    if isinstance(dataset, ArrowDataset):
        number = random.randrange(len(dataset)) if wish == "random" else int(wish) if wish.isdigit() else 0
        number = min(number, len(dataset) - 1)
        prompt, (sample,) = dataset.prompt(number), dataset.read([number])
        labels = sample["labels"][len(prompt) :].tolist()
        response = list(takewhile(lambda label: label != IGNORE_INDEX, labels))
        return Example(prompt, response, (dataset.prompt((number + 1) % len(dataset)),) if len(dataset) > 1 else ())
    if not hasattr(data, "test_dataset"):
        return None
    # the command line hands a number over as text
    eval = replace(eval, evaluate_example=int(wish) if wish.isdigit() else wish)
    return Example(tokenizer.encode(data.prompt_style.apply(select_sft_generate_example(eval, data))))


def refresh_page(
    fabric: L.Fabric,
    run: Run,
    state: dict,
    complain: Callable[[str], None],
    goes_on: bool = False,
    stopped: str | None = None,
) -> None:
    """Write ``out_dir/report.html`` anew in process 0, if anything was logged; if it cannot be, the run goes on.

    Each file that cannot be shown is told once; ``complain`` is told if there is no new page. While the run ``goes_on``
    the page reloads itself; ``stopped`` is what it says of one that has ended before its time.
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
        write_page(run.out_dir / PAGE, [read_run(run.out_dir, tell_once)], goes_on, stopped)
    except Exception as error:
        # whatever it is, a page is not worth a run
        complain(f"{run.out_dir / PAGE} was not refreshed ({type(error).__name__}: {reason(error)})")


@contextmanager
def end_on_page(fabric: L.Fabric, run: Run, state: dict) -> Iterator[None]:
    """Whatever ends a run before its student is saved, its page says where and why, and no longer that it goes on."""
    try:
        yield
    except BaseException as error:
        is_saved = state["saved_student"] == state["step_count"]
        # an error after that is told together with what became of the page
        if fabric.is_global_zero and not (is_saved and isinstance(error, Exception)):
            refresh_page(fabric, run, state, tell, stopped=None if is_saved else how_it_ended(run, state, error))
        raise


def how_it_ended(run: Run, state: dict, error: BaseException) -> str:
    """At which step a run was stopped, by what, and how to go on."""
    if isinstance(error, Exception):
        why = "another process of this run has ended" if is_loss_of_another(error) else reason(error)
    else:
        names = {128 + number: number.name for number in STOP_SIGNALS}
        why = names.get(getattr(error, "code", None), type(error).__name__)
    step = next((path.name for path in newest_first(run.out_dir) if (path / MANIFEST).is_file()), None)
    on = "No checkpoint was saved: the same command begins anew."
    if step is not None:
        on = f"The same command with --resume auto goes on from {step}."
    return f"Stopped at step {state['step_count']:,} of {state['steps']:,}: {why.removesuffix('.')}. {on}"
