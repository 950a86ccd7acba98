"""One format of prompts told to two readers: what LitGPT's style makes is what the chat template makes, and back."""

import pickle

import pytest
from helpers.encoding_cases import CASES, Case, talk, train_tokenizer, write_tokenizer
from litgpt.prompts import (
    Alpaca,
    ChatML,
    Default,
    Gemma,
    Llama3,
    PromptStyle,
    SmolLM2,
    TinyLlama,
    load_prompt_style,
    prompt_styles,
)
from litgpt.tokenizer import Tokenizer
from transformers import PreTrainedTokenizerFast

from litgpt_akl.data.encoding import Encoder
from litgpt_akl.models import template_style
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.model_files import copy_model_files
from litgpt_akl.models.prompt_format import Learnt, PromptFormat, style_like, template_like, trained_format
from litgpt_akl.models.template_style import TemplateStyle, save_style
from litgpt_akl.models.tokenizer import OneBosTokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GEMMA = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
GEMMA += "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
OF_MY_OWN = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}assistant> "


TRIMMED = GEMMA.replace("m.content", "m.content | trim")
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
REPLACED = CHATML.replace("m.content", "m.content.replace('\n\n', '\n')")
DATED = "{{ strftime_now('%Y-%m-%d') }}{% if quiet is defined and quiet %}Hush.{% endif %}" + CHATML
EOS_LAST = CHATML.replace("assistant\n{% endif", "assistant\n{{ eos_token }}{% endif")
NO_OPENING = CHATML.split("{% if add_generation")[0]


def learnt(template, tokenizer, ends=(), **changes) -> Learnt:
    entries = {"style": Default(), "has_written": True, "is_own": True, "keywords": {}}
    return Learnt(**{**entries, "template": template, "ends": ends, "stop": (tokenizer.eos_id, *ends), **changes})


def by_litgpt(source, style, out_dir, text):
    """What LitGPT makes of a question by a style that was written to a student's files."""
    out_dir.mkdir()
    copy_model_files(source, out_dir, style)
    PromptFormat(style).write(out_dir)
    found = load_prompt_style(out_dir)
    assert found == style or not isinstance(style, TemplateStyle)
    return Tokenizer(out_dir).encode(found.apply(text)).tolist()


@pytest.mark.parametrize(
    ("source", "end", "expected"),
    [
        (CHATML, None, ChatML),
        (GEMMA, "</s>", Gemma),
        # LitGPT's stop at the EOS token alone, or keep white space
        (CHATML, "<|im_end|>", TemplateStyle),
        (GEMMA, "<end_of_turn>", TemplateStyle),
        (TRIMMED, "</s>", TemplateStyle),
        (OF_MY_OWN, None, TemplateStyle),
        (REPLACED, "<|im_end|>", TemplateStyle),
        (DATED, "<|im_end|>", TemplateStyle),
        (THINKING, "<|im_end|>", TemplateStyle),
        # LitGPT takes the EOS token away with which a prompt ends
        (EOS_LAST, "<|im_end|>", None),
    ],
)
@pytest.mark.parametrize("use_bos", [False, True])
@pytest.mark.parametrize("kind", ["byte-level", "prepended space"])
def test_a_template_has_a_style_that_litgpt_loads(tmp_path, source, end, expected, use_bos, kind):
    directory = write_tokenizer(tmp_path / "m", train_tokenizer(kind), Case(source, ""), add_bos_token=use_bos)
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory)
    ends = () if end is None else (tokenizer.token_to_id(end),)
    if expected is not None and use_bos != (source in (GEMMA, TRIMMED)):
        # by LitGPT texts begin otherwise than by the template, which only a style of our own follows
        expected = TemplateStyle
    style = style_like(learnt(template, tokenizer, ends), tokenizer)
    assert style is None if expected is None else isinstance(style, expected)
    if style is not None:
        reference = PreTrainedTokenizerFast.from_pretrained(directory)
        for number, text in enumerate((" Who is it?\n", "a.b\n\n\ue000 {{ c }}", '"\\n" \'{% raw %}')):
            ids = reference.apply_chat_template(talk(text), add_generation_prompt=True, return_dict=False)
            assert by_litgpt(directory, style, tmp_path / f"{number}", text) == ids
        assert set(ends) <= {id for [id] in style.stop_tokens(Tokenizer(tmp_path / "0"))}


def test_the_style_of_a_template_takes_a_system_message_and_stays_on_its_day(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), Case(DATED, ""))
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory, "2001-02-03")
    style = style_like(learnt(template, tokenizer), tokenizer)
    save_style(style, tmp_path)
    style = pickle.loads(pickle.dumps(load_prompt_style(tmp_path)))
    assert style.apply("Who?") == template.generation_prompt(talk("Who?"))
    assert style.apply("Who?").startswith("2001-02-03<|im_start|>user\nWho?")
    assert style.apply("Who?", sys_prompt="Be brief.") == template.generation_prompt(talk("Who?", system="Be brief."))
    with pytest.raises(AttributeError, match="has no attribute 'Style'"):
        template_style.Style  # noqa: B018


def test_keywords_of_training_are_those_of_the_students_template(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), Case(DATED, ""))
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory)
    keywords = {"quiet": True, "unused": {"a": ["it's", None, 1.5]}}
    ends = (tokenizer.token_to_id("<|im_end|>"),)
    form, notes = trained_format(learnt(template, tokenizer, ends, keywords=keywords), tokenizer)
    expected = template.generation_prompt(talk("Who?"), keywords)
    assert "Hush." in expected and form.style.apply("Who?") == expected
    form.write(directory)
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    asked = {"add_generation_prompt": True, "tokenize": False}
    assert reference.apply_chat_template(talk("Who?"), **asked) == expected
    assert "Hush." not in reference.apply_chat_template(talk("Who?"), quiet=False, **asked)
    assert len(notes) == 2 and "litgpt-akl's" in notes[0] and "Responses end in <|im_end|>" in notes[1]


def test_a_template_without_a_text_for_a_generation_gets_one(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), Case(NO_OPENING, ""))
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory)
    form, notes = trained_format(learnt(template, tokenizer), tokenizer)
    assert isinstance(form.style, ChatML)
    assert "writes nothing for a generation" in notes[0] and "assistant\\n" in notes[0]
    form.write(directory)
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    expected = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert reference.apply_chat_template(talk("Who?"), add_generation_prompt=True, tokenize=False) == expected
    assert reference.apply_chat_template(talk("a", "b"), tokenize=False) == template.render(talk("a", "b")).text


def test_a_template_that_asks_otherwise_than_it_trains_is_told(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), Case(THINKING, ""))
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory)
    _, notes = trained_format(learnt(template, tokenizer), tokenizer)
    assert notes[0].startswith("The chat template puts '' before a response, and '<think>\\n' where it asks")


def test_what_litgpt_cannot_be_told_is_said(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), Case(EOS_LAST, ""))
    tokenizer, template = OneBosTokenizer(directory), ChatTemplate.find(directory)
    _, notes = trained_format(learnt(template, tokenizer), tokenizer)
    assert any("No response of the data ends in a special token" in note for note in notes)
    assert any("`litgpt chat` will ask the student otherwise" in note for note in notes)


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
