"""One format of prompts told to two readers: what LitGPT's style makes is what the chat template makes, and back."""

import pytest
from helpers.encoding_cases import CASES, Case, talk, train_tokenizer, write_tokenizer
from litgpt.prompts import Alpaca, ChatML, Default, Gemma, Llama3, PromptStyle, SmolLM2, TinyLlama, prompt_styles
from transformers import PreTrainedTokenizerFast

from litgpt_akl.data.encoding import Encoder
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.prompt_format import style_like, template_like
from litgpt_akl.models.tokenizer import OneBosTokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GEMMA = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
GEMMA += "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
OF_MY_OWN = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}assistant> "


@pytest.mark.parametrize(("source", "expected"), [(CHATML, ChatML), (GEMMA, Gemma), (OF_MY_OWN, None)])
def test_a_template_has_a_style_where_litgpt_has_one(tmp_path, source, expected):
    directory = write_tokenizer(
        tmp_path, train_tokenizer("byte-level"), Case(source, ""), add_bos_token=source == GEMMA
    )
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory)
    style = style_like(template, tokenizer)
    assert style is None if expected is None else isinstance(style, expected)
    if style is not None:
        reference = PreTrainedTokenizerFast.from_pretrained(directory)
        ids = reference.apply_chat_template(talk("Who is it?"), add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode(style.apply("Who is it?")).tolist() == ids


class Sorted(PromptStyle):
    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        return "".join(sorted(prompt))


@pytest.mark.parametrize("use_bos", [False, True])
@pytest.mark.parametrize("style", [Default(), Alpaca(), ChatML(), SmolLM2(), Gemma(), Llama3(), TinyLlama()])
def test_a_style_has_a_template(tmp_path, style, use_bos):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), CASES["llama-3"], add_bos_token=use_bos)
    tokenizer = OneBosTokenizer(directory)
    source = template_like(style, tokenizer)
    write_tokenizer(tmp_path / "other", tokenizer.processor, Case(source, "", "<|eot_id|>", "<|begin|>"))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path / "other")
    for record in (
        {"instruction": 'Who "is"\n it?', "output": "Alice."},
        {"instruction": "Who?", "output": "Alice.", "system": "Be brief."},
    ):
        encoded = Encoder(tokenizer, style, None).encode(record)
        messages = talk(record["instruction"], record["output"], system=record.get("system"))
        assert reference.apply_chat_template(messages, return_dict=False) == encoded.ids
        asked = reference.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == encoded.ids[: encoded.spans[0]]


def test_a_style_that_no_template_can_follow_has_none(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), CASES["llama-3"])
    assert template_like(Sorted(), OneBosTokenizer(directory)) is None
    # each of LitGPT's has one, or is known to need more than a text
    without = [
        name for name, kind in prompt_styles.items() if template_like(kind(), OneBosTokenizer(directory)) is None
    ]
    assert without == []
