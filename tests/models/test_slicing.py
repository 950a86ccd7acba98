"""Narrower students: what is cut out of every family, and that both descriptions and both libraries agree on it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.calibration import layerwise
from helpers.families import FAMILIES, write_family
from helpers.marks import with_all_slow_but
from helpers.runs import alice, gpt
from litgpt.config import Config
from litgpt.model import Block
from transformers import AutoModelForCausalLM

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.messages import UserError
from litgpt_akl.models.importance import measure_importance
from litgpt_akl.models.layerwise import LayerwiseModel
from litgpt_akl.models.slicing import SlicedWeights, choose_parts
from litgpt_akl.models.student_config import FAMILIES as KINDS
from litgpt_akl.models.student_config import IN_STEP, full_sizes, model_type, student_sizes
from litgpt_akl.models.weights import open_weights, read_config
from litgpt_akl.training.calibration import read_samples

IDS = torch.arange(4, 124).view(2, 60)
FEW = [("Llama-3.2-1B", True), ("Gemma-3-1b-it", True), ("pythia-14m", False), ("Qwen3-30B-A3B", False)]
CASES = [(name, tied) for name in FAMILIES for tied in (False, True)]


def smaller(config: Config, kind: str) -> dict[str, int]:
    """Sizes of a student that is narrower in all that its family has."""
    less = 16 if config.n_expert else 10
    wanted = {"width": config.n_embd - 16, "mlp": (config.moe_intermediate_size or config.intermediate_size) - less}
    wanted["heads"] = config.n_head - (config.n_query_groups if config.n_query_groups < config.n_head else 1)
    assert KINDS[kind] != IN_STEP or wanted["heads"] * config.head_size == wanted["width"]
    return wanted | ({"experts": config.n_expert - 1} if config.n_expert else {})


@torch.no_grad()
def make_spare(directory: Path, sizes: dict[str, int]) -> None:
    """Change a checkpoint so that all that a student of these sizes lacks does nothing: by random numbers of parts."""
    model, random = gpt(directory), torch.Generator().manual_seed(1)
    config = model.config

    def draw(total: int, count: int) -> list[int]:
        return torch.randperm(total, generator=random)[:count].tolist()

    # one channel is the same for all tokens, by which a router can leave an expert out
    steady, *idle = draw(config.n_embd, config.n_embd - sizes["width"] + 1)
    used = sorted({*range(config.n_embd)} - {*idle, steady})
    embeddings = model.transformer.wte.weight
    embeddings.mul_(30)
    _write_to_used(embeddings.T, used, [*idle, steady], config)
    # logits that are not so large that a cap flattens them
    offset = 1.0 if "Gemma" in config.name else 0.0
    ln_f = model.transformer.ln_f.weight
    ln_f.copy_((ln_f + offset) / 60 - offset)
    if config.n_expert:
        embeddings[:, steady] = 5.0
    for name, parameter in model.named_parameters():
        if "norm" in name.split(".")[-2] and name.endswith("bias") or name == "transformer.ln_f.bias":
            parameter[idle] = 0
    for block in model.transformer.h:
        _make_heads_spare(block, config, sizes["heads"], draw)
        mlps = [*block.mlp.experts] if config.n_expert else [block.mlp]
        for mlp in mlps:
            for part in (getattr(mlp, name, None) for name in ("fc", "fc_1", "fc_2")):
                if part is not None:
                    part.weight.mul_(2)
            for tensor in [mlp.fc.weight, mlp.fc.bias] if hasattr(mlp, "fc") else [mlp.fc_1.weight, mlp.fc_1.bias]:
                if tensor is not None:
                    tensor[draw_once(mlp, draw, sizes["mlp"])] = 0
        if config.n_expert:
            block.mlp.gate.weight[:, steady] = 0
            block.mlp.gate.weight[draw(config.n_expert, config.n_expert - sizes["experts"]), steady] = -1e4
        for proj in (block.attn.proj, *(mlp.proj for mlp in mlps)):
            proj.weight.mul_(10)
            _write_to_used(proj.weight, used, [*idle, steady], config)
            if proj.bias is not None:
                _write_to_used(proj.bias[:, None], used, [*idle, steady], config)
    weights = model.state_dict()
    if torch.equal(model.lm_head.weight, torch.load(directory / "lit_model.pth")["transformer.wte.weight"]):
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, directory / "lit_model.pth")


def draw_once(mlp: torch.nn.Module, draw, kept: int) -> list[int]:
    """The same channels each time."""
    if not hasattr(mlp, "idle"):
        mlp.idle = draw(mlp.intermediate_size, mlp.intermediate_size - kept)
    return mlp.idle


def _write_to_used(rows: torch.Tensor, used: list[int], others: list[int], config: Config) -> None:
    """What writes to hidden states ``[n_embd, k]`` leaves some channels alone; of LayerNorms the mean stays 0."""
    rows[others] = 0
    if config.norm_class_name == "LayerNorm":
        rows[used] -= rows[used].mean(dim=0)


def _make_heads_spare(block: Block, config: Config, kept: int, draw) -> None:
    """Heads of their own keys have no values; of those that share them, one looks everywhere, the others at one."""
    attention, size = block.attn, config.n_head // config.n_query_groups
    qkv = [tensor for tensor in (attention.qkv.weight, attention.qkv.bias) if tensor is not None]
    heads = draw(config.n_head, config.n_head - kept)
    if size > 1:
        count = size - kept // config.n_query_groups
        heads = [group * size + head for group in range(config.n_query_groups) for head in draw(size, count)]
    for tensor in qkv:
        by_head = tensor.view(-1, config.head_size, *tensor.shape[1:])
        by_head[: config.n_head] *= 20
        by_head[heads] = 0
        if size == 1:
            by_head[[config.n_head + head for head in heads]] = 0
            by_head[[2 * config.n_head + head for head in heads]] = 0
    if attention.norm_q is not None:
        attention.norm_q.weight.mul_(60)
    for head in heads:
        attention.proj.weight[:, head * config.head_size : (head + 1) * config.head_size] = 0


@torch.no_grad()
@pytest.mark.parametrize(("name", "tied"), with_all_slow_but(FEW, CASES))
def test_what_does_nothing_is_what_is_dropped(alice_json, tmp_path, name, tied):
    write_family(name, teacher := tmp_path / name, tied=tied)
    config = read_config(teacher)
    kind = json.loads((teacher / "config.json").read_text())["model_type"]
    sizes = smaller(config, kind)
    make_spare(teacher, sizes)
    make_student(teacher, tmp_path / "student", **sizes, data=alice(alice_json), records=12)
    student, expected = read_config(tmp_path / "student"), gpt(teacher).eval()(IDS)
    found = gpt(tmp_path / "student").eval()(IDS)
    assert (student.n_embd, student.n_head, student.n_expert) == (
        sizes["width"],
        sizes["heads"],
        sizes.get("experts", 0),
    )
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    export_hf(tmp_path / "student", tmp_path / "exported")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    exported, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", **options)
    assert not any(loading.values()), loading
    assert (exported.eval()(IDS).logits - found).abs().max() < 1e-4 * expected.abs().max()
    assert exported.config.get_text_config().hidden_size == sizes["width"]
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["tie_word_embeddings"] is tied


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-2b", "Mixtral-8x7B-v0.1"])
def test_a_student_of_all_parts_is_the_teacher_bit_for_bit(alice_json, tmp_path, name):
    write_family(name, teacher := tmp_path / name, tied=False)
    full = {"width": 64, "mlp": 1.0, "heads": 4, **({"experts": 1} if "Mixtral" in name else {})}
    make_student(teacher, tmp_path / "student", **full, layers=2, data=alice(alice_json), records=3)
    assert torch.equal(gpt(tmp_path / "student").eval()(IDS), gpt(teacher).eval()(IDS))
    assert read_config(tmp_path / "student") == read_config(teacher)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-2b", "Mixtral-8x7B-v0.1", "pythia-14m"])
def test_a_student_that_is_cut_as_it_is_read_is_the_written_one_bit_for_bit(alice_json, tmp_path, name):
    write_family(name, teacher := tmp_path / name, tied=True, layers=4)
    config = read_config(teacher)
    sizes = smaller(config, model_type(teacher))
    make_student(teacher, tmp_path / "student", layers=[0, 2, 3], **sizes, data=alice(alice_json), records=3)
    samples = read_samples(alice(alice_json), teacher, config, 3, None)
    importance = measure_importance(layerwise(teacher), samples)
    kept = choose_parts(importance, config, [0, 2, 3], full_sizes(config) | sizes)
    weights = SlicedWeights(open_weights(teacher, config), config, kept)
    student = LayerwiseModel(read_config(tmp_path / "student"), weights, torch.device("cpu"), torch.float32, 120)
    hidden = student.embed(IDS)
    # in any order
    for layer in (2, 0, 1):
        with student.block(layer):
            pass
    for layer in range(3):
        with student.block(layer) as block:
            hidden = student.run(block, hidden)
    found = student.lm_head.logits(student.ln_f(hidden))
    assert torch.equal(found, gpt(tmp_path / "student").eval()(IDS))


@torch.no_grad()
def test_fewer_layers_and_narrower_ones(teacher_dir, alice_json, tmp_path):
    """Both at once, as params says, and named layers."""
    options = {"width": 0.75, "mlp": 0.5, "heads": 2, "data": alice(alice_json), "records": 6}
    make_student(teacher_dir, tmp_path / "named", layers=[0, 3], **options)
    config = read_config(tmp_path / "named")
    assert (config.n_layer, config.n_embd, config.intermediate_size, config.n_head) == (2, 96, 168, 2)
    make_student(teacher_dir, tmp_path / "share", params=0.4, **options)
    model = gpt(tmp_path / "share")
    parameters = sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel()
    whole = sum(p.numel() for p in gpt(teacher_dir).parameters()) - 1024 * 128
    assert 0.3 * whole < parameters <= 0.4 * whole
    weights = torch.load(tmp_path / "share" / "lit_model.pth", weights_only=True)
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


def test_shares_give_friendly_sizes():
    config = Config.from_name("Llama-3.1-8B")
    assert student_sizes(config, {"width": 0.7, "mlp": 0.5, "heads": 0.8}, "llama") == {
        "width": 2880,
        "mlp": 7168,
        "heads": 24,
        "experts": 0,
    }
    config = Config.from_name("Mixtral-8x7B-v0.1")
    assert student_sizes(config, {"experts": 0.5}, "mixtral") == {
        "width": 4096,
        "mlp": 14336,
        "heads": 32,
        "experts": 4,
    }
    config = Config.from_name("pythia-14m")
    assert student_sizes(config, {"width": 96, "heads": 0.75}, "gpt_neox") == {
        "width": 96,
        "mlp": 512,
        "heads": 3,
        "experts": 0,
    }


@pytest.mark.parametrize(
    ("name", "kind", "wanted", "message"),
    [
        ("Llama-3.1-8B", "llama", {"width": 5000}, "--width 5000, but the teacher has 4096"),
        ("Llama-3.1-8B", "llama", {"mlp": 100.5}, "--mlp 100.5, but the teacher has 14336"),
        ("Llama-3.1-8B", "llama", {"mlp": -1}, "--mlp must be above 0, got -1"),
        ("Llama-3.1-8B", "llama", {"heads": 20}, "32 heads are 8 groups.*\nGive 16 or 24"),
        ("Llama-3.1-8B", "llama", {"experts": 2}, "Llama-3.1-8B has no mixture of experts"),
        ("Mixtral-8x7B-v0.1", "mixtral", {"experts": 1.5}, "--experts 1.5, but the teacher has 8"),
        ("Mixtral-8x7B-v0.1", "mixtral", {"mlp": 7170}, "--mlp 7170.* multiple of 8.*\nGive 7168"),
        ("Mixtral-8x7B-v0.1", "mixtral", {"experts": 0.1}, "--experts 1: each token is read by 2"),
        ("pythia-14m", "gpt_neox", {"width": 96}, "of the type gpt_neox.* size 32.\nGive --width 96 --heads 3"),
        ("falcon-7b", "falcon", {"heads": 64}, "of the type falcon.* size 64.\nGive --width 4544 --heads 71"),
        ("stablelm-3b-4e1t", "stablelm", {"mlp": 0.5}, "models of the type stablelm are not known to take"),
    ],
)
def test_sizes_that_a_family_does_not_allow_are_refused(name, kind, wanted, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        student_sizes(Config.from_name(name), wanted, kind)


def test_latent_attention_is_refused():
    config = Config.from_name("Llama-3.2-1B")
    config.latent_attention = {"q_lora_rank": 4}
    with pytest.raises(UserError, match="Llama-3.2-1B has latent attention"):
        student_sizes(config, {"width": 0.5}, None)
