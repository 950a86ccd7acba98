"""Students to distil and export: tied or not, said so or not, with a BOS token, with capped logits."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import materials
import tokenizers
import torch
from litgpt.config import Config
from litgpt.model import GPT

CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
BOS_ID = materials.SPECIAL_TOKENS.index("<bos>")
SOFTCAP = 2.0
SIZES = (
    "block_size",
    "head_size",
    "intermediate_size",
    "n_embd",
    "n_head",
    "n_layer",
    "n_query_groups",
    "padded_vocab_size",
    "vocab_size",
)


@dataclass
class Case:
    """What a student starts from, and whether its head and embeddings are one matrix in training."""

    source: str
    """The fixture of its checkpoint directory"""
    tied: bool
    folder: str = "tiny-student"
    tie_in_config: bool | None = None
    tie_option: bool | None = None
    softcap: float | None = None

    @property
    def bos(self) -> bool:
        """LitGPT adds a BOS token in folders with this name."""
        return self.folder.startswith("Llama-3")


CASES = {
    "tied": Case("student_dir", tied=True),
    "untied": Case("untied_student_dir", tied=False),
    "tied-bos": Case("student_dir", tied=True, folder="Llama-3-tiny"),
    "untied-bos": Case("untied_student_dir", tied=False, folder="Llama-3-tiny"),
    "equal-untied-by-config": Case("student_dir", tied=False, tie_in_config=False),
    "equal-untied-by-option": Case("student_dir", tied=False, tie_option=False),
    "equal-tied-by-option": Case("student_dir", tied=True, tie_in_config=False, tie_option=True),
    "softcapped": Case("gemma_dir", tied=True, softcap=SOFTCAP),
}


def write_source(case: Case, original: Path, directory: Path) -> None:
    """A copy of ``original`` with the files that LitGPT's own copying forgets, changed as ``case`` says."""
    shutil.copytree(original, directory)
    edit_json(directory / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    materials.write_json(directory / "special_tokens_map.json", {"bos_token": "<bos>", "eos_token": "<eos>"})
    edit_json(directory / "config.json", dtype="bfloat16")
    if case.bos:
        write_bos_rule_of_llama_3(directory)
    if case.tie_in_config is not None:
        edit_json(directory / "config.json", tie_word_embeddings=case.tie_in_config)


def write_bos_rule_of_llama_3(directory: Path) -> None:
    """As in Llama 3's files: tokenizer.json says that texts start with a BOS token, tokenizer_config.json nothing."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    entries = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    del entries["add_bos_token"]
    materials.write_json(directory / "tokenizer_config.json", entries)


def write_gemma_2(directory: Path) -> None:
    """A random Gemma 2 of two layers, tied; the cap bends its logits and does not flatten them."""
    sizes = {name: getattr(materials.STUDENT_CONFIG, name) for name in SIZES}
    config = Config.from_name(
        "Gemma-2-2b",
        **sizes,
        attention_scores_scalar=sizes["head_size"],
        sliding_window_indices=[1, 0],
        final_logit_softcapping=SOFTCAP,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(config)
        model.lm_head.weight = model.transformer.wte.weight
        torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    materials.write_checkpoint(directory, config, model.state_dict(), tied=True)
    edit_json(
        directory / "config.json",
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        query_pre_attn_scalar=sizes["head_size"],
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=SOFTCAP,
    )


def edit_json(path: Path, **entries) -> None:
    materials.write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})
