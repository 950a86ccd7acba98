"""Memory of a block that is found without running it is that of the block that runs."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from litgpt import lora, model
from litgpt.config import Config, configs

from litgpt_akl.models.model_size import block_kinds, measure_block

BASE = Config(
    name="small",
    n_layer=2,
    n_embd=64,
    n_head=4,
    n_query_groups=2,
    intermediate_size=192,
    padded_vocab_size=512,
    block_size=256,
    bias=False,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
    rotary_percentage=1.0,
    parallel_residual=False,
)
CASES = {
    "llama": BASE,
    "pythia": replace(BASE, n_query_groups=4, bias=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP"),
    "parallel": replace(BASE, parallel_residual=True),
    "gemma 2": replace(
        BASE, mlp_class_name="GemmaMLP", attention_logit_softcapping=50.0, post_attention_norm=True, post_mlp_norm=True
    ),
    "sliding": replace(BASE, sliding_window_size=8, sliding_window_indices=[1, 1]),
    "qwen 3": replace(BASE, norm_qk=True),
    "mixtral": replace(BASE, mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, moe_intermediate_size=192),
    "lora": lora.Config(
        **{name: value for name, value in vars(BASE).items() if name in Config.__dataclass_fields__},
        lora_r=4,
        lora_query=True,
        lora_value=True,
        lora_mlp=True,
    ),
}


def kept_by_autograd(config: Config, batch: int, time: int, dtype: torch.dtype, mixed: bool) -> int:
    """Bytes of the different memory that a block's forward saves for its backward, and of its output."""
    block = (lora.Block if isinstance(config, lora.Config) else model.Block)(config, 0).to(dtype)
    if isinstance(config, lora.Config):
        lora.mark_only_lora_as_trainable(block)
    hidden = torch.randn(batch, time, config.n_embd, dtype=dtype, requires_grad=True)
    position = torch.randn(1, time, config.rope_n_elem)
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            output = block(hidden, position, position)
    saved[output.untyped_storage().data_ptr()] = output.untyped_storage().nbytes()
    for tensor in (hidden, position, *block.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_forward_keeps_is_what_autograd_saves(case, precision):
    dtype, mixed = torch.bfloat16 if precision == "bf16-true" else torch.float32, precision == "bf16-mixed"
    shape = 3, 40
    found = measure_block(CASES[case], 0, *shape, dtype, mixed)
    assert found.kept == pytest.approx(kept_by_autograd(CASES[case], *shape, dtype, mixed), rel=0.03)
    assert found.no_grad < found.forward
    assert found.kept <= found.forward
    assert found.kept < found.backward


def test_a_block_of_llama_keeps_what_its_formulas_say():
    config, tokens = Config.from_name("Llama-3.1-8B"), 2 * 512
    # two norms (their product and their output), queries, keys, values, attention, its copy for the projection, two
    # sums, and four of the MLP
    width = 2 * 2 + 5 + 2
    numbers = tokens * (width * config.n_embd + 4 * config.intermediate_size)
    assert measure_block(config, 0, 2, 512, torch.float32, False).kept == pytest.approx(4 * numbers, rel=0.005)


def test_memory_grows_with_tokens_and_not_with_their_order():
    config = Config.from_name("Llama-3.2-1B")
    long, wide, both = (
        measure_block(config, 0, *shape, torch.bfloat16, False).kept for shape in ((2, 2048), (4, 1024), (4, 2048))
    )
    assert long == pytest.approx(wide, rel=0.01) and both == pytest.approx(2 * long, rel=0.01)


def test_every_kind_of_block_that_litgpt_has_can_be_measured():
    kinds = {}
    for entry in configs:
        config = Config(**entry)
        parts = (config.norm_class_name, config.mlp_class_name, config.parallel_residual, config.norm_qk)
        attention = (config.sliding_window_indices is None, config.latent_attention is None)
        kinds[(*parts, *attention, config.attention_logit_softcapping)] = config
    assert len(kinds) >= 10
    for config in kinds.values():
        for index, count in block_kinds(config).items():
            memory = measure_block(config, index, 1, 64, torch.bfloat16, False)
            assert 0 < memory.kept < memory.backward and count > 0


def test_blocks_are_counted_by_kind():
    assert block_kinds(BASE) == {0: 2}
    assert block_kinds(replace(BASE, n_layer=5, sliding_window_size=8, sliding_window_indices=[1, 0, 1, 0, 1])) == {
        0: 3,
        1: 2,
    }
    mixture = replace(CASES["mixtral"], n_layer=5, first_k_dense_replace=1)
    assert block_kinds(mixture) == {0: 1, 1: 4}
