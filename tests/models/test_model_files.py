"""A student's tokenizer starts texts as LitGPT did in training, in LitGPT and in Transformers."""

import json
import shutil

import pytest
from litgpt.tokenizer import Tokenizer
from transformers import AutoTokenizer

from litgpt_akl.models.model_files import copy_model_files

TEXT = "Who stole the tarts?"
BOS = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
SEQUENCES = [{"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")]
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [BOS, SEQUENCES[0]],
    "pair": [BOS, SEQUENCES[0], BOS, SEQUENCES[1]],
    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("folder", ["Llama-3-tiny", "neutral"])
@pytest.mark.parametrize(
    "post_processor",
    [None, TEMPLATE, BYTE_LEVEL, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}],
    ids=["nothing", "bos", "byte-level", "byte-level and bos"],
)
def test_both_tokenizers_agree_with_training(teacher_dir, tmp_path, folder, post_processor):
    source, out_dir = tmp_path / folder, tmp_path / "final"
    shutil.copytree(teacher_dir, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": post_processor}))
    in_training = Tokenizer(source).encode(TEXT).tolist()
    assert (in_training[0] == 2) == (folder == "Llama-3-tiny")
    out_dir.mkdir()
    copy_model_files(source, out_dir)
    assert Tokenizer(out_dir).encode(TEXT).tolist() == in_training
    assert AutoTokenizer.from_pretrained(out_dir)(TEXT)["input_ids"] == in_training
    # what already says the same is left as it is
    again = tmp_path / "again"
    again.mkdir()
    copy_model_files(out_dir, again)
    assert (again / "tokenizer.json").read_bytes() == (out_dir / "tokenizer.json").read_bytes()
