"""Scores against the slow, obvious reference: hooks on Transformers' model, and sums written out."""

from collections import defaultdict

import pytest
import torch
from helpers.calibration import layerwise, random_samples
from helpers.families import FAMILIES, write_family
from helpers.runs import gpt
from transformers import AutoModelForCausalLM

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.models.importance import measure_importance

DOWN = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc2")
OUT = ("self_attn.o_proj", "attention.dense", "self_attn.dense", "self_attention.dense")
LAST = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
MIXTURES = ("Qwen3-30B-A3B", "Mixtral-8x7B-v0.1")
LENGTHS = [9, 30, 17]


@torch.no_grad()
def by_hooks(model: torch.nn.Module, samples: list, n_head: int, width: int) -> dict[str, torch.Tensor]:
    """Scores of a Transformers model by layer, each sample read whole and alone."""
    seen: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    base = model.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    for number, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda module, args, output, key=("block", number): seen[key].append(
                (args[0], output[0] if isinstance(output, tuple) else output)
            )
        )
        for name, module in layer.named_modules():
            if "norm" in type(module).__name__.lower() and "attn" not in name.split(".")[0]:
                module.register_forward_hook(
                    lambda module, args, output, key=("norm", number, name): seen[key].append(output)
                )
            for kind, names in (("mlp", DOWN), ("heads", OUT)):
                if name in names:
                    module.register_forward_pre_hook(lambda module, args, key=(kind, number): seen[key].append(args[0]))
    last = next(
        module
        for name, module in base.named_children()
        if name in ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    )
    last.register_forward_hook(lambda module, args, output: seen[("norm", "last", "")].append(output))
    for sample in samples:
        model(sample.input_ids[None])
    found: dict[str, list] = defaultdict(list)
    norms = []
    for key, values in seen.items():
        if key[0] == "block":
            cosines = [torch.cosine_similarity(*pair, dim=-1).flatten() for pair in values]
            found["blocks"].append(1 - torch.cat(cosines).mean())
        elif key[0] == "norm":
            assert values[0].size(-1) == width
            norms.append(torch.stack([value[0].abs().mean(dim=0) for value in values]).norm(dim=0))
        elif key[0] == "mlp":
            found["mlp"].append(
                torch.stack([value.view(-1, value.size(-1)).abs().mean(dim=0) for value in values]).norm(dim=0)
            )
        else:
            lengths = [value[0].unflatten(-1, (n_head, -1)).norm(dim=-1).mean(dim=0) for value in values]
            found["heads"].append(torch.stack(lengths).norm(dim=0))
    return {name: torch.stack(values) for name, values in found.items()} | {"width": torch.stack(norms).sum(dim=0)}


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_hooks_on_transformers_model(tmp_path, name):
    write_family(name, tmp_path / name, tied=False)
    export_hf(tmp_path / name, tmp_path / "exported")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model, calls = layerwise(tmp_path / name), []
    samples = random_samples(LENGTHS, model.config.padded_vocab_size)
    found = measure_importance(model, samples, lambda: calls.append(1))
    assert len(calls) == model.config.n_layer * len(samples)
    wanted = by_hooks(reference, samples, model.config.n_head, model.config.n_embd)
    own = {"blocks": found.blocks, "width": found.width, "heads": torch.stack([*found.heads.values()])}
    if name not in MIXTURES:
        own["mlp"] = torch.stack([*found.mlp.values()])
    else:
        wanted.pop("mlp", None)
    assert own.keys() == wanted.keys()
    for kind, scores in own.items():
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, wanted[kind], rtol=1e-4, atol=1e-4, msg=f"{kind} differ")


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_count_by_what_is_routed_to_them(tmp_path, name):
    write_family(name, tmp_path / name, tied=False)
    parts, whole = layerwise(tmp_path / name), gpt(tmp_path / name).eval()
    samples = random_samples(LENGTHS, parts.config.padded_vocab_size)
    found = measure_importance(parts, samples)
    experts = torch.zeros(2, len(samples), 4)
    inputs = torch.zeros(2, 4, len(samples), whole.transformer.h[0].mlp.experts[0].intermediate_size)
    for layer, block in enumerate(whole.transformer.h):
        read = []
        block.mlp.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0][0]))
        for sample in samples:
            whole(sample.input_ids[None])
        for number, tokens in enumerate(read):
            for token in tokens:
                logits, chosen = block.mlp.gate(token).topk(parts.config.n_expert_per_token)
                for weight, expert in zip(logits.softmax(0), chosen.tolist(), strict=True):
                    mlp = block.mlp.experts[expert]
                    inner = torch.nn.functional.silu(mlp.fc_1(token)) * mlp.fc_2(token)
                    experts[layer, number, expert] += weight * mlp.proj(inner).norm() / len(tokens)
                    inputs[layer, expert, number] += inner.abs() / len(tokens)
        name = f"transformer.h.{layer}.mlp"
        torch.testing.assert_close(found.experts[name], experts[layer].norm(dim=0), rtol=1e-4, atol=1e-5)
        for expert in range(4):
            own = found.mlp[f"{name}.experts.{expert}"]
            torch.testing.assert_close(own, inputs[layer, expert].norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "OLMo-2-1124-7B", "phi-2"])
def test_energy_is_each_channels_share_of_what_a_norm_divides_by(tmp_path, name):
    write_family(name, tmp_path / name, tied=False)
    parts, whole = layerwise(tmp_path / name), gpt(tmp_path / name).eval()
    samples = random_samples(LENGTHS, parts.config.padded_vocab_size)
    found, shares = measure_importance(parts, samples).energy, defaultdict(list)
    for norm, module in whole.named_modules():
        if norm in found:
            module.register_forward_pre_hook(lambda module, args, norm=norm: shares[norm].append(args[0][0]))
    with torch.no_grad():
        for sample in samples:
            whole(sample.input_ids[None])
    assert shares.keys() == found.keys()
    for norm, read in shares.items():
        values = torch.cat(read)
        if name == "phi-2":
            values = values - values.mean(dim=1, keepdim=True)
        wanted = torch.stack([value**2 / (value**2).sum() for value in values]).mean(dim=0)
        torch.testing.assert_close(found[norm], wanted, rtol=1e-4, atol=1e-6)
        assert found[norm].sum().item() == pytest.approx(1, abs=1e-5)
