"""How a student made of its teacher's parts is described, and which sizes it may have: a table of families."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt.config import Config

from litgpt_akl.messages import UserError
from litgpt_akl.models.model_files import read_hf_config, write_json

SIZES = ("width", "mlp", "heads", "experts")
"""Options that make a student narrower than its teacher."""
ALL, IN_STEP = "free", "width = heads x head size"
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi3", "phi"), ALL),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), ALL),
    **dict.fromkeys(("gpt_neox", "falcon"), IN_STEP),
}
"""Model types of config.json whose students may be narrower, and how. Transformers' classes of the last two work the
size of a head out from width and heads; of others it is not known that they read all sizes that a student may have."""
HF_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
HF_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "n_head": "n_head",
    "num_key_value_heads": "n_query_groups",
    "num_kv_heads": "n_query_groups",
    "intermediate_size": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "n_expert",
    "num_local_experts": "n_expert",
}
"""Entries of config.json that say a size, and what LitGPT calls it."""


def full_sizes(config: Config) -> dict[str, int]:
    """A model's sizes by the names of the options; 0 experts if it has no mixture of them."""
    mlp = config.moe_intermediate_size if config.n_expert and config.moe_intermediate_size else config.intermediate_size
    return {"width": config.n_embd, "mlp": mlp, "heads": config.n_head, "experts": config.n_expert}


def student_sizes(config: Config, wanted: dict[str, float], kind: str | None) -> dict[str, int]:
    """Sizes of a student in numbers, of options that are numbers, or shares up to 1, which are rounded.

    Shares give multiples of 64, or of 8 in what is smaller than 512. ``kind`` is the teacher's model_type, if it has a
    config.json.

    Raises:
        UserError: the family does not allow it, or the numbers do not fit it.
    """
    sizes = full_sizes(config)
    _check_family(config, wanted, kind)
    for name, value in wanted.items():
        full, whole = sizes[name], round(value)
        if value <= 1:
            sizes[name] = _rounded(name, value, config, full)
        elif value != whole or whole > full:
            raise UserError(
                f"--{name} {value:g}, but the teacher has {full}.\nGive a whole number up to that, or a share up to 1."
            )
        else:
            sizes[name] = whole
    _check_sizes(config, sizes, wanted, kind)
    return sizes


def _rounded(name: str, share: float, config: Config, full: int) -> int:
    step = 64 if full >= 512 else 8
    if name == "heads":
        step = 1 if config.n_query_groups == config.n_head else config.n_query_groups
    elif name == "experts":
        step = 1
    return full if share == 1 else min(full, max(step, round(share * full / step) * step))


def _check_family(config: Config, wanted: dict[str, float], kind: str | None) -> None:
    if not wanted:
        return
    first, way_out = next(iter(wanted)), "Take layers out alone, by --layers or --params."
    if config.latent_attention or config.n_expert_groups:
        raise UserError(f"--{first}: {config.name} has latent attention or groups of experts.\n{way_out}")
    if kind is not None and kind not in FAMILIES:
        raise UserError(
            f"--{first}: models of the type {kind} are not known to take other sizes; {', '.join(FAMILIES)} are."
            f"\n{way_out}"
        )
    for name, value in wanted.items():
        if value <= 0:
            raise UserError(f"--{name} must be above 0, got {value:g}: a share up to 1, or a number.")
    if "experts" in wanted and not config.n_expert:
        raise UserError(f"--experts {wanted['experts']:g}: {config.name} has no mixture of experts.\nLeave it out.")
    if "mlp" in wanted and config.n_expert and config.first_k_dense_replace:
        raise UserError(f"--mlp: {config.name} has MLPs of two sizes.\n{way_out}")


def _check_sizes(config: Config, sizes: dict[str, int], wanted: dict[str, float], kind: str | None) -> None:
    heads, groups = sizes["heads"], config.n_query_groups
    if groups != config.n_head and heads % groups:
        lower = heads // groups * groups
        raise UserError(
            f"--heads {heads}: the teacher's {config.n_head} heads are {groups} groups, which all keep as many.\n"
            f"Give {' or '.join(str(number) for number in (lower, lower + groups) if number)}."
        )
    if config.n_expert and "mlp" in wanted and sizes["mlp"] % 8:
        raise UserError(
            f"--mlp {sizes['mlp']}: where experts are multiplied together, their MLPs must be a multiple of 8 wide.\n"
            f"Give {max(8, round(sizes['mlp'] / 8) * 8)}."
        )
    if "experts" in wanted and sizes["experts"] < config.n_expert_per_token:
        raise UserError(
            f"--experts {sizes['experts']}: each token is read by {config.n_expert_per_token}.\nGive that or more."
        )
    width = sizes["width"]
    if FAMILIES.get(kind) == IN_STEP and {"width", "heads"} & wanted.keys() and width != heads * config.head_size:
        fitting = max(1, width // config.head_size)
        raise UserError(
            f"--width {width} with {heads} heads: of the type {kind}, the width must be the heads times their size"
            f" {config.head_size}.\nGive --width {fitting * config.head_size} --heads {fitting}."
        )


def student_config(teacher: Config, layers: Sequence[int], sizes: dict[str, int]) -> Config:
    """LitGPT's configuration of a student with these layers and sizes."""

    def subset(per_layer: list[int] | None) -> list[int] | None:
        return None if per_layer is None else [per_layer[layer] for layer in layers]

    separate = bool(teacher.n_expert and teacher.moe_intermediate_size)
    return replace(
        teacher,
        n_layer=len(layers),
        sliding_window_indices=subset(teacher.sliding_window_indices),
        rope_indices=subset(teacher.rope_indices),
        first_k_dense_replace=_leading_layers(teacher.first_k_dense_replace, layers),
        n_embd=sizes["width"],
        n_head=sizes["heads"],
        n_query_groups=sizes["heads"] if teacher.n_query_groups == teacher.n_head else teacher.n_query_groups,
        n_expert=sizes["experts"],
        moe_intermediate_size=sizes["mlp"] if separate else teacher.moe_intermediate_size,
        intermediate_size=teacher.intermediate_size if separate else sizes["mlp"],
    )


def _leading_layers(count: int | None, layers: Sequence[int]) -> int | None:
    return None if count is None else sum(layer < count for layer in layers)


def model_type(checkpoint_dir: Path) -> str | None:
    """What config.json calls the family, if there is one."""
    path = checkpoint_dir / "config.json"
    return read_hf_config(path).get("model_type") if path.is_file() else None


def edit_hf_config(path: Path, teacher: Config, student: Config, layers: Sequence[int]) -> None:
    """Makes a Hugging Face config.json of a teacher describe its student of these layers."""
    hf_config = read_hf_config(path)
    # models with several parts, such as Gemma 3, describe the language model in an entry of its own
    text_config: dict[str, Any] = hf_config.get("text_config", hf_config)
    text_config["num_hidden_layers"] = len(layers)
    text_config["vocab_size"] = student.padded_vocab_size
    for name in HF_LAYER_LISTS:
        if isinstance(text_config.get(name), list):
            text_config[name] = [text_config[name][layer] for layer in layers]
    if "first_k_dense_replace" in text_config:
        text_config["first_k_dense_replace"] = _leading_layers(text_config["first_k_dense_replace"], layers)
    if "layer_types" not in text_config and len(set(teacher.sliding_window_indices or [])) > 1:
        # Gemma's classes derive the kind of a layer from its number, which has changed
        kinds = {0: "full_attention", 1: "sliding_attention"}
        text_config["layer_types"] = [kinds[teacher.sliding_window_indices[layer]] for layer in layers]
    _edit_sizes(text_config, teacher, student)
    write_json(path, hf_config)


def _edit_sizes(text_config: dict[str, Any], teacher: Config, student: Config) -> None:
    for entry, name in HF_NAMES.items():
        if getattr(student, name) != getattr(teacher, name) and text_config.get(entry) is not None:
            text_config[entry] = getattr(student, name)
    kind = text_config.get("model_type")
    if kind == "falcon":
        # left out, it is four times the width
        text_config["ffn_hidden_size"] = student.intermediate_size
    if full_sizes(student) != full_sizes(teacher) and FAMILIES.get(kind, ALL) == ALL:
        # it would be worked out from sizes that have changed
        text_config["head_dim"] = student.head_size
        for entry in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
            # an entry that is left out has the class's own number
            if text_config.get(entry) is None:
                text_config[entry] = getattr(student, HF_NAMES[entry])
