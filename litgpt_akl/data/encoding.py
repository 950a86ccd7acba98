"""Records become token ids, and it is known which of them are responses."""

from bisect import bisect_right
from functools import cached_property
from operator import itemgetter

from litgpt.data import SFTDataset
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as Processor

from litgpt_akl.messages import quoted
from litgpt_akl.models.chat_template import ChatTemplate

PROBE = "probe"


class Encoder:
    """Turns records into token ids and the spans of their responses. It can be pickled.

    A record has ``instruction``, ``output`` and optionally ``input``, all text, or else ``messages``: a list of
    ``{"role": "system" | "user" | "assistant", "content": text}``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_style: PromptStyle,
        template: ChatTemplate | None,
        max_length: int | None = None,
    ) -> None:
        """Reads which tokens are special.

        Messages take the template, or the prompt style if there is none, as for SentencePiece (``tokenizer.model``),
        which would read the special tokens that a template writes as common text. A record is cut off after
        ``max_length`` tokens, at least 2.
        """
        if template is not None and tokenizer.backend != "huggingface":
            raise ValueError("a chat template needs a tokenizer.json; with tokenizer.model give None")
        self._tokenizer, self._prompt_style, self._template = tokenizer, prompt_style, template
        self._max_length = max_length
        if template is not None:
            self._processor = _without_limits(tokenizer.processor)
            added = self._processor.get_added_tokens_decoder()
            self._special_ids = {id for id, token in added.items() if token.special}

    def encode(self, record: dict) -> tuple[list[int], list[int]]:
        """A record's token ids and the spans of its responses.

        An instruction gives the ids of ``litgpt.data.SFTDataset``, messages with a chat template those of
        Transformers' ``apply_chat_template``.

        Returns:
            ids: at most ``max_length``.
            spans: ``[begin, end, begin, end, ...]``, positions in ``ids`` of each response and of what ends it, in
                ascending order; at least one, none empty, none with position 0, which no token predicts.

        Raises ValueError if the record cannot be used, and says why; where it stands is for the caller to add.
        """
        if not isinstance(record, dict):
            raise ValueError(f"is {_kind(record)}, not a record")
        if "messages" in record and not ("instruction" in record and "output" in record):
            messages = record["messages"]
            _check_messages(messages)
            ids, spans = self._encode_by_style(messages) if self._template is None else self._encode_chat(messages)
        else:
            _check_instruction(record)
            ids, spans = self._encode_instruction(record)
        return self._cut(ids, spans)

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

    def _encode_instruction(self, record: dict) -> tuple[list[int], list[tuple[int, int]]]:
        # every other field is a keyword of the style, where `prompt` is the instruction's name
        record = {name: value for name, value in record.items() if name != "prompt"}
        dataset = SFTDataset([record], self._tokenizer, self._prompt_style)
        try:
            sample = dataset[0]
        except (AttributeError, KeyError, TypeError) as error:
            raise self._refusal(error) from error
        begin = sample["labels"].tolist().count(dataset.ignore_index)
        return sample["input_ids"].tolist(), [(begin, len(sample["input_ids"]))]

    def _refusal(self, error: Exception) -> ValueError:
        return ValueError(f"the prompt style {type(self._prompt_style).__name__} fails: {error!r}")

    def _encode_by_style(self, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = messages[0 if system is None else 1 :]
        _check_order(turns, first=1 if system is None else 2)
        ids, spans = [], []
        # of a last prompt without an answer nothing can be learnt
        for prompt, answer in zip(turns[::2], turns[1::2], strict=False):
            if spans:
                ids += self._encode_later_prompt(self._apply(prompt["content"], None))
            else:
                ids += self._tokenizer.encode(self._apply(prompt["content"], system)).tolist()
            begin = len(ids)
            ids += self._tokenizer.encode(answer["content"], bos=False, eos=True).tolist()
            spans.append((begin, len(ids)))
        return ids, spans

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

    def _encode_chat(self, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        text, spans = self._template.render(messages)
        _check_text(text, "its text")
        encoding = self._processor.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        return ids, [self._find_tokens(text, ids, offsets, *span) for span in spans]

    def _find_tokens(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], begin: int, end: int
    ) -> tuple[int, int]:
        """The tokens of the characters from ``begin`` to ``end`` and of what ends the turn.

        A token may reach over an edge by white space: `` Hello`` after a colon is one token. Tokens of no width come
        from byte-level tokenizers: a space, whose place is before their offset.
        """
        first = bisect_right(offsets, begin, key=itemgetter(1))
        if first < len(ids) and offsets[first][0] < begin and not text[offsets[first][0] : begin].isspace():
            first += 1
        last = bisect_right(offsets, end, key=itemgetter(1))
        if last < len(ids) and offsets[last][0] < end and text[end : offsets[last][1]].isspace():
            last += 1
        return first, self._find_turn_end(text, ids, offsets, last, end)

    def _find_turn_end(self, text: str, ids: list[int], offsets: list[tuple[int, int]], last: int, end: int) -> int:
        """Where a turn ends: after a special token that follows its text directly, or an EOS token after white space.

        Llama 2 has a space before its EOS token. Any other special token after white space begins the next turn.
        """
        for number in range(last, len(ids)):
            if ids[number] in self._special_ids:
                return number + 1 if offsets[number][0] <= end or ids[number] == self._tokenizer.eos_id else last
            if text[end : offsets[number][1]].strip():
                break
        return last


def _without_limits(processor: Processor) -> Processor:
    """The tokenizer without the truncation and padding of its tokenizer.json, which Transformers does not apply."""
    if processor.truncation is None and processor.padding is None:
        return processor
    processor = Processor.from_str(processor.to_str())
    processor.no_truncation()
    processor.no_padding()
    return processor


def _check_instruction(record: dict) -> None:
    missing = [name for name in ("instruction", "output") if name not in record]
    if len(missing) == 2:
        raise ValueError("has neither 'instruction' and 'output' nor 'messages'")
    if missing:
        raise ValueError(f"has no field '{missing[0]}'")
    for name in ("instruction", "output", "input", "sys_prompt"):
        if name in ("instruction", "output") or record.get(name) is not None:
            _check_text(record[name], f"'{name}'")
    if not record["output"].strip():
        raise ValueError("its response is empty")


def _check_messages(messages: list) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"'messages' is {_kind(messages)}, not a list")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {_kind(message)}, not one with 'role' and 'content'")
        for name in ("role", "content"):
            if name not in message:
                raise ValueError(f"message {number} has no field '{name}'")
            _check_text(message[name], f"'{name}' of message {number}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"its response is empty: message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message of the role 'assistant'")


def _check_order(turns: list[dict], first: int) -> None:
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            found = quoted(message["role"], 40)
            raise ValueError(f"message {first + number} has the role '{found}', expected '{expected}'")


def _check_text(value, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {value[error.start]!r}, half of a character that takes two") from error


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
