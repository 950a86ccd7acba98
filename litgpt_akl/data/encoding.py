"""Records become token ids and labels: it is known which tokens are responses."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from tokenizers import Encoding
from tokenizers import Tokenizer as Processor
from torch import Tensor

from litgpt_akl.data.chat_messages import check_text, is_given, kind
from litgpt_akl.data.formats import Conversation, Instruction, asks_only, read_format, with_response
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import UserError, quoted
from litgpt_akl.models.chat_template import ALSO_SAID, ChatTemplate, bare, said_in

PROBE = "probe"
STAND_IN = "Answer"
"""A response where EOS is no text."""
MATTERS = ("input", "context", "system", "sys_prompt", "history", "tools", "documents", "functions")
"""Fields of a record that say what a model is asked: unread, it would learn to answer something else."""


class Encoded(NamedTuple):
    """A record's tokens, and what of the record they have."""

    ids: list[int]
    spans: list[int]
    """``[begin, end, begin, end, ...]``: positions in ``ids`` of each response and of what ends it, in ascending order;
    at least one, none with position 0, which no token predicts. Only that of a prompt alone is empty."""
    said: int = 0
    """Characters of the assistant's messages that are to be learnt, white space not counted."""
    lost: int = 0
    """Of these, characters that the text has not."""
    notes: tuple[str, ...] = ()
    """What a user is to know of the record, in words that are the same for all such records."""
    by_template: bool = False
    """Whether a chat template wrote the text, and not a prompt style."""


def make_labels(input_ids: Tensor, spans: np.ndarray) -> Tensor:
    """The ids of responses where they stand, and ``IGNORE_INDEX`` elsewhere; not shifted.

    Args:
        input_ids: ``[length]``.
        spans: ``[begin, end, begin, end, ...]``, as :class:`Encoded` has them.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for begin, end in spans.reshape(-1, 2):
        labels[begin:end] = input_ids[begin:end]
    return labels


class StyledInstruction:
    """Which fields of an instruction a prompt style reads. It can be pickled."""

    def __init__(self, prompt_style: PromptStyle) -> None:
        self._prompt_style = prompt_style
        self._reads: dict[str, bool] = {}

    def fit(self, instruction: Instruction) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The fields that a style makes a prompt of, with all that matters in them, and notes on the others.

        Raises:
            ValueError: a field that matters is not read.
        """
        fields, notes = dict(instruction.fields), []
        style = type(self._prompt_style).__name__
        if instruction.system and self._is_read("sys_prompt", fields):
            fields["sys_prompt"] = instruction.system
        elif instruction.system:
            fields["instruction"] = f"{instruction.system}\n\n{fields['instruction']}"
        for name in [name for name in fields if name not in ("instruction", "output")]:
            if not is_given(fields[name]) or self._is_read(name, fields):
                continue
            value = fields.pop(name)
            if name == "input":
                fields["instruction"] = f"{fields['instruction']}\n\n{value}"
                notes.append(
                    f"the field 'input' stands after the instruction: the prompt style {style} has no place for it"
                )
            elif name in MATTERS:
                advice = "; give --data.columns '{input: context}'" if name == "context" else ""
                raise ValueError(f"has '{name}', which the prompt style {style} does not read{advice}")
            else:
                notes.append(f"the field '{quoted(name, 40)}' is not read")
        return fields, tuple(notes)

    def _is_read(self, name: str, fields: dict[str, Any]) -> bool:
        if name not in self._reads:
            # `prompt` and `self` are the style's own words
            others = {key: value for key, value in fields.items() if key not in ("prompt", "self", name)}
            self._reads[name] = name not in ("prompt", "self") and self._differs(name, others)
        return self._reads[name]

    def _differs(self, name: str, others: dict[str, Any]) -> bool:
        try:
            one, other = (self._prompt_style.apply(PROBE, **others, **{name: text}) for text in ("one", "other"))
        except (AttributeError, KeyError, TypeError):
            # a style of the user's own may want more of a field than a text
            return True
        return one != other


def puts_marks(prompt_style: PromptStyle) -> bool:
    """Whether a prompt style writes anything around what it is given."""
    try:
        return prompt_style.apply(PROBE).strip() != PROBE
    except (AttributeError, KeyError, TypeError):
        # a style of the user's own that wants more is not without marks
        return True


class Encoder:
    """Turns records of the formats in :mod:`~litgpt_akl.data.formats` into token ids and spans. It can be pickled."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_style: PromptStyle,
        template: ChatTemplate | None,
        max_length: int | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        keywords: Mapping[str, Any] | None = None,
        refuse_chats: str | None = None,
        last_only: bool = False,
        prompts_alone: bool = False,
    ) -> None:
        """Reads which tokens are special.

        Args:
            tokenizer: the student's.
            prompt_style: for instructions, and for messages if there is no template.
            template: for messages. None for SentencePiece (``tokenizer.model``): there special tokens that a template
                writes would be read as common text.
            max_length: tokens after which a record is cut off; at least 2.
            columns: the data's name of a field by ours.
            keywords: what every conversation's template is given, if the record does not say otherwise.
            refuse_chats: what a user is told who has conversations, if none can be read.
            last_only: whether only the last of the assistant's messages is learnt.
            prompts_alone: whether records may have no response; of these nothing is learnt.

        Raises:
            ValueError: a template for a tokenizer that cannot read what it writes.
        """
        if template is not None and tokenizer.backend != "huggingface":
            raise ValueError("a chat template needs a tokenizer.json; with tokenizer.model give None")
        self._tokenizer, self._prompt_style, self._template = tokenizer, prompt_style, template
        self._max_length, self._columns, self._keywords = max_length, columns, dict(keywords or {})
        self._refuse_chats, self._last_only, self._prompts_alone = refuse_chats, last_only, prompts_alone
        self._styled = StyledInstruction(prompt_style)
        if template is not None:
            self._processor = _without_limits(tokenizer.processor)
            added = self._processor.get_added_tokens_decoder()
            self._special_ids = {id for id, token in added.items() if token.special}

    def encode(self, record: dict) -> Encoded:
        """A record's token ids, at most ``max_length``, and the spans of its responses.

        An instruction gives the ids of ``litgpt.data.SFTDataset``, messages with a chat template those of
        Transformers' ``apply_chat_template``.

        Args:
            record: as read from JSON: nothing about it is taken for granted.

        Raises:
            ValueError: the record cannot be used. The message says why; where it stands is for the caller to add.
            UserError: no record of its format can be used.
        """
        if not isinstance(record, dict):
            raise ValueError(f"is {kind(record)}, not a record")
        if self._prompts_alone and asks_only(record, self._columns):
            return self._encode_prompt(record)
        form = read_format(record, self._columns)
        if self._last_only and isinstance(form, Conversation):
            form = form.with_last_only()
        if isinstance(form, Instruction):
            encoded = self._encode_instruction(form)
        elif self._template is None:
            encoded = self._encode_by_style(form)
        else:
            encoded = self._encode_chat(form)
        notes = (*encoded.notes, *(f"the field '{quoted(name, 40)}' is not read" for name in form.unread))
        for name, theirs in (self._columns or {}).items():
            if theirs not in record:
                notes += (f"there is no field '{quoted(theirs, 40)}', which --data.columns names for '{name}'",)
        if self._max_length is not None and len(encoded.ids) > self._max_length:
            notes += (f"cut off after {self._max_length:,} tokens",)
        ids, spans = self._cut(encoded.ids, encoded.spans)
        return encoded._replace(ids=ids, spans=spans, notes=notes)

    def with_stand_in(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with a response before whose tokens stand those that ``litgpt chat`` would ask; it means nothing.

        Raises:
            ValueError: the record asks nothing.
        """
        # with a special token no text before it makes one token
        is_text = self._tokenizer.backend == "huggingface"
        end = self._tokenizer.processor.id_to_token(self._tokenizer.eos_id) if is_text else STAND_IN
        return with_response(record, end, self._columns)

    def end_of_responses(self) -> int:
        """The id that ends a response in a chat; raises ValueError if the template makes none of a question."""
        name = (self._columns or {}).get("messages", "messages")
        asked = self.encode(self.with_stand_in({name: [{"role": "user", "content": PROBE}]}))
        return asked.ids[asked.spans[-1] - 1]

    def _encode_prompt(self, record: dict) -> Encoded:
        encoded = self.encode(self.with_stand_in(record))
        begin = encoded.spans[-2]
        return encoded._replace(ids=encoded.ids[:begin], spans=[begin, begin], said=0, lost=0)

    def _cut(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        limit = len(ids) if self._max_length is None else self._max_length
        kept = []
        for begin, end in spans:
            begin, end = max(begin, 1), min(end, limit)
            if begin < end:
                kept += begin, end
        if not kept:
            cut = f"the limit of {limit} tokens cuts its response off" if len(ids) > limit else "its response has none"
            raise ValueError(f"has no token to learn from: {cut}")
        return ids[:limit], kept

    def _encode_instruction(self, instruction: Instruction) -> Encoded:
        fields, notes = self._styled.fit(instruction)
        try:
            # as litgpt.data.SFTDataset does, but for a third text that it encodes to count what nobody asks here
            prompt = self._tokenizer.encode(self._prompt_style.apply(prompt=fields["instruction"], **fields)).tolist()
            response = self._tokenizer.encode(fields["output"], bos=False, eos=True).tolist()
        except (AttributeError, KeyError, TypeError) as error:
            raise self._refusal(error) from error
        ids, said = prompt + response, len(bare(fields["output"]))
        return Encoded(ids, [(len(prompt), len(ids))], said, 0, notes)

    def _refusal(self, error: Exception) -> ValueError:
        return ValueError(f"the prompt style {type(self._prompt_style).__name__} fails: {error!r}")

    def _encode_by_style(self, conversation: Conversation) -> Encoded:
        messages = conversation.messages
        if self._refuse_chats is not None:
            raise UserError(self._refuse_chats)
        for name in (*conversation.keywords, "tool_calls"):
            if name in conversation.keywords or any(is_given(message.get(name)) for message in messages):
                raise ValueError(f"has '{name}', which only a chat template can read; there is none")
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = messages[0 if system is None else 1 :]
        _check_order(turns, first=1 if system is None else 2)
        trained = conversation.trained[-len(turns) :]
        ids, spans, said, lost = [], [], 0, 0
        # of a last prompt without an answer nothing can be learnt
        for number, (prompt, answer) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
            if ids:
                ids += self._encode_later_prompt(self._apply(prompt["content"], None))
            else:
                ids += self._tokenizer.encode(self._apply(prompt["content"], system)).tolist()
            begin = len(ids)
            ids += self._tokenizer.encode(answer["content"], bos=False, eos=True).tolist()
            if trained[2 * number + 1]:
                spans.append((begin, len(ids)))
                thought, content = map(len, said_in(answer))
                lost, said = lost + thought, said + thought + content
        return Encoded(ids, spans, said, lost)

    def _encode_later_prompt(self, prompt: str) -> list[int]:
        """A prompt without the BOS token that only a text's begin has."""
        ids = self._tokenizer.encode(prompt, bos=self._bos_opens_turns).tolist()
        # one may come from the tokenizer, another from the style
        while not self._bos_opens_turns and ids and ids[0] == self._tokenizer.bos_id:
            del ids[0]
        return ids

    def _apply(self, prompt: str, system: str | None) -> str:
        try:
            if system is not None and not self._style_takes_system:
                prompt, system = f"{system}\n\n{prompt}", None
            return self._prompt_style.apply(prompt, sys_prompt=system)
        except (AttributeError, KeyError, TypeError) as error:
            raise self._refusal(error) from error

    @cached_property
    def _style_takes_system(self) -> bool:
        return PROBE in self._prompt_style.apply("", sys_prompt=PROBE)

    @cached_property
    def _bos_opens_turns(self) -> bool:
        """Does the style begin every message with the BOS token, as ChatML does with SmolLM2's ``<|im_start|>``?"""
        if self._tokenizer.backend != "huggingface" or self._tokenizer.bos_id is None:
            return False
        bos = self._tokenizer.processor.id_to_token(self._tokenizer.bos_id)
        prompt = self._apply(PROBE, PROBE)
        return prompt.startswith(bos) and prompt.count(bos) > 1

    def _encode_chat(self, conversation: Conversation) -> Encoded:
        messages, template = conversation.messages, self._template
        if "tools" in conversation.keywords and template.for_tools is not None:
            template = template.for_tools
        for name in conversation.keywords:
            if not template.reads(name):
                raise ValueError(
                    f"has '{name}', which the chat template does not read; --data.chat_template chooses another"
                )
        if any(is_given(message.get("tool_calls")) for message in messages) and not template.reads("tool_calls"):
            raise ValueError("has 'tool_calls', which the chat template does not read")
        rendering = template.render(messages, {**self._keywords, **conversation.keywords})
        check_text(rendering.text, "its text")
        _check_shown(rendering.text, messages)
        encoding = self._processor.encode(rendering.text, add_special_tokens=False)
        ids = encoding.ids
        assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        kept = [order for order, number in enumerate(assistants) if conversation.trained[number]]
        spans = [self._find_tokens(rendering.text, ids, encoding, *rendering.spans[order]) for order in kept]
        said, lost = (sum(counts[order] for order in kept) for counts in (rendering.said, rendering.lost))
        learnt = [messages[assistants[order]] for order in kept]
        notes = (*_describe_unread(messages, template), *self._describe_ends(learnt, ids, spans))
        notes += _describe_arguments(messages, rendering.text)
        return Encoded(ids, spans, said, lost, notes, by_template=True)

    def _describe_ends(self, learnt: list[dict], ids: list[int], spans: list[tuple[int, int]]) -> Iterator[str]:
        """Notes on responses that do not end once, of messages that are learnt."""
        ends = [ids[end - 1] if ids[end - 1] in self._special_ids else None for _, end in spans]
        if None in ends:
            yield "the chat template writes no special token that ends a response: it is not learnt to stop there"
        for message, end in zip(learnt, ends, strict=True):
            token = None if end is None else self._processor.id_to_token(end)
            if token is not None and message["content"] != token and message["content"].rstrip().endswith(token):
                yield f"a response has {token} at its end, and the chat template writes another one"
                return

    def _find_tokens(self, text: str, ids: list[int], encoding: Encoding, begin: int, end: int) -> tuple[int, int]:
        """The tokens of the characters from ``begin`` to ``end`` and of what ends the turn.

        A token may reach over an edge by white space: `` Hello`` after a colon is one token. Tokens of no width come
        from byte-level tokenizers: a space, whose place is before their offset.
        """
        count, characters = len(ids), encoding.token_to_chars
        first = _token_at(encoding, begin, count)
        if first < count and (start := characters(first)[0]) < begin and not text[start:begin].isspace():
            first += 1
        last = _token_at(encoding, end, count)
        if last < count and characters(last)[0] < end and text[end : characters(last)[1]].isspace():
            last += 1
        return first, self._find_turn_end(text, ids, encoding, last, end)

    def _find_turn_end(self, text: str, ids: list[int], encoding: Encoding, last: int, end: int) -> int:
        """Where a turn ends: after a special token that follows its text directly, or an EOS token after white space.

        Llama 2 has a space before its EOS token. Any other special token after white space begins the next turn.
        """
        for number in range(last, len(ids)):
            begins, ends = encoding.token_to_chars(number)
            if ids[number] in self._special_ids:
                return number + 1 if begins <= end or ids[number] == self._tokenizer.eos_id else last
            if text[end:ends].strip():
                break
        return last


def _token_at(encoding: Encoding, place: int, count: int) -> int:
    """The first token that ends after a character: the one that has it, or the next one if none has."""
    token = encoding.char_to_token(place)
    if token is None:
        # a few of the offsets are asked for, since a list of all takes as long as a tenth of the tokenizer's work
        return bisect_right(range(count), place, key=lambda number: encoding.token_to_chars(number)[1])
    return token


def _without_limits(processor: Processor) -> Processor:
    """The tokenizer without the truncation and padding of its tokenizer.json, which Transformers does not apply."""
    if processor.truncation is None and processor.padding is None:
        return processor
    processor = Processor.from_str(processor.to_str())
    processor.no_truncation()
    processor.no_padding()
    return processor


def _check_shown(text: str, messages: list[dict]) -> None:
    """Refuses a conversation of whose prompts the text lacks one: templates pass over roles that they do not know."""
    bare_text = None
    for number, message in enumerate(messages, start=1):
        content = message["content"]
        if message["role"] == "assistant" or content.strip() in text:
            continue
        bare_text = bare_text or bare(text)
        # what tools answer is written as JSON by some
        forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
        if not any(bare(form) in bare_text for form in forms):
            raise ValueError(
                f"the chat template leaves out message {number} of the role '{quoted(message['role'], 40)}'"
            )


def _describe_unread(messages: list[dict], template: ChatTemplate) -> tuple[str, ...]:
    names = {name for message in messages for name in message} - {"role", "content", *ALSO_SAID}
    unread = sorted(name for name in names if not template.reads(name))
    return tuple(f"the field '{quoted(name, 40)}' of messages is not read" for name in unread)


def _describe_arguments(messages: list[dict], text: str) -> tuple[str, ...]:
    """A note on arguments of tools that are JSON as text, if the template quotes them as one: most want an object."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                return ("arguments of tools are text, which the chat template writes in quotes: give objects",)
    return ()


def _check_order(turns: list[dict], first: int) -> None:
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise ValueError(
                f"message {first + number} has the role '{quoted(message['role'], 40)}', expected '{expected}'"
            )
