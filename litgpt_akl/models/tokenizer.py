"""The student's tokenizer: one BOS token where a text begins, and which ids only pad the embedding."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.config import Config
from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.utils import fix_and_load_json
from tokenizers import processors

from litgpt_akl.files.reading import explain_damage
from litgpt_akl.messages import UserError
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.template_style import TemplateStyle

PROBE = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe"}]


class OneBosTokenizer(Tokenizer):
    """LitGPT's tokenizer for training: one BOS token where a text begins, one EOS token where a response ends.

    A BOS token that a text begins with stays, and never gets another before it. Whether other texts get one is LitGPT's
    rule; where that knows nothing, tokenizer.json's own. Nothing is cut off or padded, whatever tokenizer.json says,
    which is for Transformers' calls that ask for it.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        # what LitGPT reads beside the tokenizer has its own faults
        ends_beside = generation_ends(checkpoint_dir)
        try:
            super().__init__(checkpoint_dir)
        except ValueError as error:
            if "not found in the collection" not in str(error):
                raise
            path = checkpoint_dir / "tokenizer_config.json"
            raise UserError(
                f"{path} names an EOS or BOS token that tokenizer.json lacks: {error}\n"
                "Correct the one that is wrong, or take the files from the model's publisher again."
            ) from error
        except (KeyError, TypeError):
            # LitGPT asks last for a tokenizer_class, by which it only decodes single tokens otherwise
            if getattr(self, "apply_decoding_fix", ...) is not None:
                raise
        ends = as_list(self.eos_id)
        self.eos_id = ends[0] if ends else None
        self.end_ids = tuple(dict.fromkeys((*ends, *ends_beside)))
        """Each of which ends a text: tokenizer_config.json's EOS token first, then those of generation_config.json."""
        if self.backend == "huggingface":
            self.processor.no_truncation()
            self.processor.no_padding()
        self.bos = bos_text(self)
        self.adds_bos = self.bos is not None and self.processor.encode("a").ids[:1] == [self.bos_id]
        """Whether tokenizer.json itself puts a BOS token before every text, as it does for Transformers."""
        post_processor = self.processor.post_processor if self.bos is not None else None
        state = None if post_processor is None else json.loads(post_processor.__getstate__())
        self.names_bos = any(self.bos in entry.get("special_tokens", {}) for entry in _processors(state))
        """Whether it does, or did before the token was taken out of its rule."""
        if self.adds_bos:
            self.use_bos = bool(self.use_bos) or _entry(checkpoint_dir) is None
            without = processors.Sequence([])
            without.__setstate__(json.dumps(_with_bos_rule(state, self.bos, self.bos_id, False)).encode())
            self.processor.post_processor = without

    @property
    def special_ids(self) -> set[int]:
        """The ids of special tokens, which are no text; of SentencePiece those of its control symbols."""
        if self.backend == "huggingface":
            return {id for id, token in self.processor.get_added_tokens_decoder().items() if token.special}
        return {id for id in range(self.processor.vocab_size()) if self.processor.is_control(id)}

    def encode(self, string: str, device=None, bos: bool | None = None, eos: bool = False, max_length: int = -1):
        """LitGPT's, which takes a BOS or EOS token away that the text itself has, if it is asked to add one or none."""
        if bos is None and self.bos is not None and string.startswith(self.bos):
            bos = True
        ids = super().encode(string, device, bos)
        if eos:
            # a tensor's elements take long to compare one by one
            tokens = ids.tolist()
            while tokens and tokens[-1] == self.eos_id:
                del tokens[-1]
            ids = ids.new_tensor([*tokens, self.eos_id])
        return ids[:max_length] if max_length > 0 else ids


def token_map(tokenizer: Tokenizer) -> dict[int, str]:
    """Token by id, special and added tokens included."""
    processor = tokenizer.processor
    if tokenizer.backend == "huggingface":
        return {id: token for token, id in processor.get_vocab(with_added_tokens=True).items()}
    return {id: processor.id_to_piece(id) for id in range(processor.vocab_size())}


def as_list(entry: int | list[int] | None) -> list[int]:
    """The ids of an entry of generation_config.json, which may be one, several or none."""
    return [] if entry is None else entry if isinstance(entry, list) else [entry]


def read_generation_config(checkpoint_dir: Path) -> dict[str, Any]:
    """The entries of a generation_config.json, none if there is no such file."""
    path = checkpoint_dir / "generation_config.json"
    return _read_forgiving(path) if path.is_file() else {}


def _read_forgiving(path: Path) -> dict[str, Any]:
    with explain_damage(path, "a file with entries in JSON"):
        # some publishers' have commas too many, which LitGPT forgives
        entries = fix_and_load_json(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise TypeError(f"it is a {type(entries).__name__}")
    return entries


def generation_ends(checkpoint_dir: Path) -> list[int]:
    """The ids at which Transformers stops: those of generation_config.json, or of config.json if there is none."""
    for name in ("generation_config.json", "config.json"):
        if (path := checkpoint_dir / name).is_file():
            return as_list(_read_forgiving(path).get("eos_token_id"))
    return []


def bos_text(tokenizer: Tokenizer) -> str | None:
    """What a BOS token is in a text; None if there is none, or if it cannot be written (SentencePiece)."""
    if tokenizer.backend != "huggingface" or tokenizer.bos_id is None:
        return None
    return tokenizer.processor.id_to_token(tokenizer.bos_id)


def _entry(checkpoint_dir: Path) -> bool | None:
    path = checkpoint_dir / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("add_bos_token") if path.is_file() else None


class BosRules(NamedTuple):
    """How a folder says what texts begin with."""

    add_bos_token: bool
    """For LitGPT: it puts BOS before a text that lacks one; without, it takes away the one that a text begins with."""
    in_json: bool
    """Whether tokenizer.json puts BOS before every text, which is all that it can do, and Transformers' rule."""
    bos: str | None
    bos_id: int | None
    changes_json: bool
    """Whether the checkpoint's tokenizer.json says otherwise."""


def bos_rules(checkpoint_dir: Path, style: PromptStyle | None, for_transformers: bool) -> BosRules:
    """The rules for a copy of a checkpoint's tokenizer, under which no text gets a second BOS token from LitGPT.

    Where prompts have a BOS token of their own, tokenizer.json must not put another one before it. Where the original's
    does all the same, as Llama 3's, it stays so in a copy for Transformers alone, whose ``apply_chat_template`` goes
    around it. A ``style`` of None is what LitGPT would take.
    """
    if not any((checkpoint_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return BosRules(bool(Tokenizer.check_if_bos_token_used(None, checkpoint_dir)), False, None, None, False)
    tokenizer = OneBosTokenizer(checkpoint_dir)
    bos = tokenizer.bos
    if bos is None:
        return BosRules(bool(tokenizer.use_bos), False, None, None, False)
    style = _own_style(checkpoint_dir) if style is None else style
    style_writes = _writes(style, bos)
    # of a template's text nothing is known but what it writes
    add = style_writes or (bool(tokenizer.use_bos) and not isinstance(style, TemplateStyle))
    in_json = add and (
        (tokenizer.names_bos and (for_transformers or not style_writes))
        or not (style_writes or _template_writes(checkpoint_dir, bos))
    )
    return BosRules(add, in_json, bos, tokenizer.bos_id, in_json != tokenizer.adds_bos)


def _own_style(checkpoint_dir: Path) -> PromptStyle | None:
    # a style of the user's own may be elsewhere
    with suppress(OSError, ImportError, AttributeError, KeyError, TypeError):
        if has_prompt_style(checkpoint_dir):
            return load_prompt_style(checkpoint_dir)
        return PromptStyle.from_config(Config.from_file(checkpoint_dir / "model_config.yaml"))
    return None


def _writes(style: PromptStyle | None, bos: str) -> bool:
    # it may need more than an instruction
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        return style.apply("probe").startswith(bos)
    return False


def _template_writes(checkpoint_dir: Path, bos: str) -> bool:
    # what is wrong with a template is said where it is used
    with suppress(UserError, ValueError):
        template = ChatTemplate.find(checkpoint_dir)
        return template is not None and template.render(PROBE)[0].startswith(bos)
    return False


def _with_bos_rule(processor: dict[str, Any] | None, bos: str, bos_id: int, use_bos: bool) -> dict[str, Any]:
    """A post-processor of tokenizer.json that puts the BOS token before every text, or before none."""
    entries = _processors(processor)
    templates = [entry for entry in entries if entry["type"] == "TemplateProcessing"]
    if use_bos and not templates:
        sequence = [{"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")]
        templates = [{"type": "TemplateProcessing", "single": sequence[:1], "pair": sequence, "special_tokens": {}}]
        entries += templates
    for template in templates:
        for name in ("single", "pair"):
            kept = [piece for piece in template[name] if piece.get("SpecialToken", {}).get("id") != bos]
            template[name] = [{"SpecialToken": {"id": bos, "type_id": 0}}, *kept] if use_bos else kept
        template["special_tokens"][bos] = {"id": bos, "ids": [bos_id], "tokens": [bos]}
    return {"type": "Sequence", "processors": entries}


def _processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if processor is None:
        return []
    return processor["processors"] if processor["type"] == "Sequence" else [processor]


def write_bos_rule(path: Path, rules: BosRules) -> None:
    """Make a tokenizer.json put the BOS token before every text, or before none; nothing else in it changes."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    rule = _with_bos_rule(tokenizer.get("post_processor"), rules.bos, rules.bos_id, rules.in_json)
    tokenizer["post_processor"] = rule
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def remove_limits(path: Path) -> None:
    """Take truncation and padding out of a tokenizer.json, which somebody left there: LitGPT would apply them."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer.get("truncation") is None and tokenizer.get("padding") is None:
        return
    tokenizer |= {"truncation": None, "padding": None}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
