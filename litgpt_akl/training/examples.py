"""Examples kept beside a run for its page: answers as both models see them token by token, and distributions."""

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import lightning as L
import torch
from litgpt.tokenizer import Tokenizer
from litgpt.utils import num_parameters
from torch import Tensor

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import MicroBatch, collate, in_order, together
from litgpt_akl.files.examples import HIGHEST, take_examples, write_examples
from litgpt_akl.files.manifest import EXAMPLES
from litgpt_akl.loss.comparison import compare, in_head
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.loss.top_k import is_packed
from litgpt_akl.messages import reason, tell
from litgpt_akl.models.generation import generate, longest_prompt, without_end
from litgpt_akl.models.gpt import Head
from litgpt_akl.models.lora import without_adapters
from litgpt_akl.models.parallel import broadcast_object, reshard
from litgpt_akl.models.several import each_model
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.run import Run, total_steps

RECORDS = 3
"""Of the validation data, from its first on."""
COMPARED = 96
"""Tokens of a text that are kept with both models' view of them, about 220 bytes each; the rest is text alone. With
all texts that makes at most 0.4 MB of a run, since only its first and its latest snapshot are kept."""
ALTERNATIVES = 5
"""The most probable tokens of each model that are kept beside a token."""
POSITIONS = 2
"""In each record's responses, of which the distributions are kept."""
TOKENS = 24
"""Shown of a distribution, the teacher's most probable first."""
CONTEXT = 20
"""Tokens shown before a position."""
NEAR = 4
"""Tokens before one that are enough to tell what it adds to the text."""


class Compared(NamedTuple):
    """Both models at the positions of one text; which row is which token's, its reader knows."""

    kl: Tensor
    """``[n]``: forward KL in nats."""
    p: Tensor
    """``[n, ALTERNATIVES]``: the teacher's highest probabilities, and the ids that have them."""
    p_ids: Tensor
    q: Tensor
    """The same of the student."""
    q_ids: Tensor
    logits: tuple[Tensor, Tensor]
    """``[k, vocab]`` of teacher and student, at the positions that were asked for."""


def keep_examples(fabric: L.Fabric, run: Run, state: dict, complain: Callable[[str], None]) -> None:
    """Keep what teacher and student say now as the latest snapshot, and as the first one if there is none.

    All processes must ask together; process 0 writes, and tells ``complain`` if the disk does not take them. Training's
    random numbers are left as they were.
    """
    dataset = state["validation_dataset"]
    found = take_examples(run.out_dir, state["has_examples"], tell) if fabric.is_global_zero else None
    before = broadcast_object(found)
    records = run.validation_records(dataset)[:RECORDS]
    prompts = [_prompt(sample) for sample in dataset.read(records)]
    answers = [{"prompt": run.pair.tokenizer.decode(prompt)} for prompt in prompts]
    latest = {"step": state["step_count"], "answers": answers, "sample": state["sample"]}
    latest |= {"run": _describe_run(fabric, run, state), "positions": []}
    for answer, number in zip(answers, records, strict=True):
        answer["recorded"], positions = _recorded(fabric, run, state, dataset, number)
        latest["positions"] += positions
    notes = _add_responses(fabric, run, state, answers, prompts, before), _of_ids(run)
    latest["note"] = " ".join(filter(None, notes))
    if fabric.is_global_zero:
        try:
            write_examples(run.out_dir, before["first"] if before else latest, latest)
            state["has_examples"] = True
        except OSError as error:
            complain(f"{run.out_dir / EXAMPLES} cannot be written ({reason(error)})")


def _of_ids(run: Run) -> str:
    """What a page is to say of a teacher of which the cache has a few ids alone; nothing if it has all."""
    if run.memory.top_k is None:
        return ""
    return (
        f"Of recorded responses the teacher's {run.memory.top_k.k:,} most probable tokens are cached, and the recorded"
        " one: all others are drawn as if they had even shares of what is left, and KL takes them for one."
    )


def _describe_run(fabric: L.Fabric, run: Run, state: dict) -> dict[str, Any]:
    """The steps that the run is to take, and what is not among its options: sizes, device, versions."""
    facts = {}
    teachers = each_model(state["teacher"].model)
    names = ["Teacher"] if len(teachers) == 1 else [f"Teacher {number}" for number in range(1, len(teachers) + 1)]
    for role, model in (("Student", state["student"]), *zip(names, teachers, strict=True)):
        if not isinstance(model, HeadOnly):
            facts[role] = f"{model.config.n_layer} layers, {num_parameters(model) / 1e6:,.1f} M parameters"
    for name, dataset in (("Training", state["dataset"]), ("Validation", state["validation_dataset"])):
        facts[name] = f"{len(dataset):,} records, {dataset.tokens:,} tokens"
    if state["top_k_cost"] is not None:
        facts["Teacher cache"] = str(state["top_k_cost"])
    facts["Validated on"] = f"{len(run.validation_records(state['validation_dataset'])):,} records each time"
    on_gpu = fabric.device.type == "cuda"
    name = (
        torch.cuda.get_device_name(fabric.device) if on_gpu else f"{fabric.device.type.upper()} ({platform.machine()})"
    )
    facts["Device"] = f"{fabric.world_size} x {name}, {run.precision}"
    facts |= {f"{name} version": version(name) for name in ("litgpt-akl", "litgpt", "torch", "lightning")}
    return {"steps": total_steps(run.train, len(state["dataset"])), "facts": facts}


def _prompt(sample: dict[str, Tensor]) -> Tensor:
    """The ids before the first that counts."""
    counted = (sample["labels"] != IGNORE_INDEX).nonzero()
    return sample["input_ids"][: int(counted[0])] if len(counted) else sample["input_ids"]


def _recorded(
    fabric: L.Fabric, run: Run, state: dict, dataset: TokenizedDataset, number: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The response of a record as both models see it, and their distributions at positions spread over it."""
    if run.pair.teacher_tokenizer is not None:
        (batch,) = in_order(dataset, [number], *run.micro_batch)
        return _describe_text(run, batch.labels.tolist(), None), []
    cache = state["caches"].validation
    (batch,) = in_order(dataset, [number], *run.micro_batch, cache=cache)
    count = len(batch.positions)
    spread = sorted({count * (2 * n + 1) // (2 * POSITIONS) for n in range(POSITIONS if count else 0)})
    compared = _compare(fabric, run, state, batch, spread, cache)
    p, q = (
        torch.softmax(logits[:, : run.pair.vocab_size].double().cpu() / run.distill.loss().temperature, dim=-1)
        for logits in compared.logits
    )
    positions = []
    for row, place in enumerate(spread):
        end = int(batch.positions[place]) + 1
        before = batch.input_ids[0, max(0, end - CONTEXT) : end]
        positions.append(_describe(run, before, int(batch.labels[place]), p[row], q[row]))
    return _describe_text(run, batch.labels.tolist(), compared), positions


def _add_responses(
    fabric: L.Fabric,
    run: Run,
    state: dict,
    answers: list[dict[str, Any]],
    prompts: list[Tensor],
    before: dict[str, Any] | None,
) -> str:
    """Add the teacher's responses, if it is there as a whole, and the student's; gives what is to be said of them."""
    if run.eval.max_new_tokens is None:
        return "There are no example responses: --eval.max_new_tokens is null."
    student, teacher, note = state["student"], state["teacher"].model, ""
    is_alike, models = run.pair.teacher_tokenizer is None, each_model(teacher)
    is_whole = not any(isinstance(model, HeadOnly) for model in models)
    longest = min(longest_prompt(model.config) for model in (student, *models))
    asked = [place for place, prompt in enumerate(prompts) if 0 < len(prompt) <= longest]
    if not asked:
        return "There are no example responses: the data masks no prompts, or they are too long."
    known = (
        {} if before is None else {answer["prompt"]: answer.get("teacher") for answer in before["latest"]["answers"]}
    )
    known = [known.get(answers[place]["prompt"]) for place in asked]
    given, responses = [prompts[place] for place in asked], {"teacher": None}
    # earlier versions kept no ids
    if all(text is not None and "ids" in text for text in known):
        responses["teacher"] = [text["ids"] for text in known]
    elif not is_alike:
        note = "The teacher's responses are missing: it has another tokenizer."
    elif len(models) > 1:
        note = "There are no teacher's responses: each of the teachers would give another one."
    elif is_whole:
        with without_adapters(teacher):
            responses["teacher"] = _generate(fabric, run, teacher, given)
    else:
        loaded = "nothing of it is loaded" if teacher.lm_head is None else "only its LM head is loaded"
        note = f"The teacher's responses are missing: {loaded}, the rest is cached."
    responses["student"] = _generate(fabric, run, student, given)
    for role, found in responses.items():
        for place, ids in zip(asked, found or (), strict=found is not None):
            compared = None
            if ids and is_alike and is_whole:
                compared = _compare(fabric, run, state, _micro_batch(prompts[place], ids))
            answers[place][role] = {**_describe_text(run, ids, compared), "ids": ids}
    return note


def _generate(fabric: L.Fabric, run: Run, model: torch.nn.Module, prompts: list[Tensor]) -> list[list[int]]:
    """What a model holds most probable, token by token."""
    options = {"max_new_tokens": run.eval.max_new_tokens, "stop": run.stop, "vocab_size": run.pair.vocab_size}
    responses: dict[int, list[int]] = {}
    for places in together(prompts, len(prompts), run.micro_batch[1]):
        found = generate(fabric, model, [prompts[place] for place in places], **options)
        responses.update(zip(places, found, strict=True))
    return [responses[place] for place in range(len(prompts))]


def _micro_batch(prompt: Tensor, response: list[int]) -> MicroBatch:
    input_ids = torch.cat((prompt, torch.tensor(response)))
    labels = input_ids.clone()
    labels[: len(prompt)] = IGNORE_INDEX
    return collate([{"input_ids": input_ids, "labels": labels}])


@torch.no_grad()
def _compare(
    fabric: L.Fabric, run: Run, state: dict, batch: MicroBatch, spread: list[int] = (), cache: Any = None
) -> Compared:
    """Both models at the first ``COMPARED`` positions of one text; logits at those of the places in ``spread``."""
    student, teacher = state["student"], state["teacher"]
    student.eval()
    ((moved, hidden),) = teacher.hidden_states([batch], cache)
    look = partial(_look, run, run.distill.loss(), teacher.model, hidden, moved, list(spread))
    with student.lm_head.output_of_head(look):
        compared = student(moved.input_ids)
    reshard(teacher.model)
    student.train()
    reshard(student.module)
    return Compared(*compared)


def _look(run: Run, loss: Any, teacher: Any, hidden: Any, batch: MicroBatch, spread: list, head: Head, own: Tensor):
    """What the student's forward gives: within it both heads are whole, also where teacher and student share one."""
    places, vocab_size = batch.positions, run.pair.vocab_size
    own, top_k = own.flatten(0, 1)[places], run.memory.top_k if is_packed(hidden) else None

    def logits(rows: slice | list[int]) -> tuple[Tensor, Tensor]:
        if top_k is not None:
            return top_k.dense(hidden[rows], batch.labels[rows]), head.logits(own[rows])
        if len(each_model(teacher)) > 1:
            mixed = teacher.lm_head.logits([of[rows] for of in hidden], vocab_size, loss.temperature)
            return mixed, head.logits(own[rows])
        with without_adapters(teacher):
            # Fabric hands hidden states of half precision over in float32
            of_teacher = teacher.lm_head.logits(hidden[rows].to(teacher.lm_head.weight.dtype))
        return of_teacher, head.logits(own[rows])

    parts = []
    size = loss.tokens_per_block(vocab_size, own.device.type)
    for start in range(0, min(len(places), COMPARED), size):
        rows = slice(start, min(start + size, COMPARED))
        scaled = [each[:, :vocab_size].float() / loss.temperature for each in logits(rows)]
        found = compare(*scaled)
        kl = found.forward_kl if top_k is None else top_k.forward_kl(hidden[rows], scaled[1].clone())
        # rounding may make it negative, and JSON knows no infinity; NaN stays
        parts.append([kl.clamp(0, HIGHEST)])
        for each, log_sum in zip(scaled, (found.teacher_log_sum, found.student_log_sum), strict=True):
            top = each.topk(min(ALTERNATIVES, vocab_size))
            parts[-1] += [(top.values - log_sum[:, None]).exp(), top.indices]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] or [own.new_zeros(0)] * 5
    return (*columns, logits(spread))


def _describe_text(run: Run, ids: list[int], compared: Compared | None) -> dict[str, Any]:
    """A text as it is kept: ``tokens`` that were compared, each with its text, KL, and both models' most probable ones
    with their probabilities; and as ``rest`` the text that follows them.
    """
    tokenizer = run.pair.tokenizer
    text = tokenizer.decode(torch.tensor(without_end(ids, run.stop), dtype=torch.int64))
    if compared is None:
        return {"tokens": [], "rest": text}
    kl, *both = (column.cpu().tolist() for column in compared[:5])
    tokens, start = [], ""
    for place, value in enumerate(kl):
        longer = tokenizer.decode(torch.tensor(ids[: place + 1]))
        # a character of several tokens is shown once it is whole
        whole = longer.startswith(start) and not longer.endswith("\ufffd")
        piece, start = (longer[len(start) :], longer) if whole else ("", start)
        if not piece and ids[place : place + 1] in run.stop:
            piece = _token_text(tokenizer, torch.tensor(ids[:0]), ids[place])
        before = torch.tensor(ids[max(0, place - NEAR) : place], dtype=torch.int64)
        likely = [
            [
                [_token_text(tokenizer, before, id), round(p, 4)]
                for p, id in zip(values[place], of_ids[place], strict=True)
            ]
            for values, of_ids in (both[:2], both[2:])
        ]
        tokens.append([piece, round(value, 4), *likely])
    return {"tokens": tokens, "rest": text[len(start) :] if text.startswith(start) else ""}


def _describe(run: Run, before: Tensor, label: int, p: Tensor, q: Tensor) -> dict[str, Any]:
    """A position as it is kept, after the ids ``before``; ``p`` and ``q`` are the distributions there, ``[vocab]``."""
    tokenizer, distill = run.pair.tokenizer, run.distill
    p, ids = p.sort(descending=True, stable=True)
    q = q[ids]
    head = in_head(p.cumsum(dim=-1), distill.akl.mu, distill.akl.head_rule)
    gaps, shown = (p - q).abs(), ids[:TOKENS]
    rank = int((ids == label).nonzero())
    return {
        "context": tokenizer.decode(before),
        "next": _token_text(tokenizer, before, label),
        "next_rank": rank,
        "next_p": p[rank].item(),
        "next_q": q[rank].item(),
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
