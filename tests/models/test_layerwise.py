import pytest
import torch
from helpers.calibration import layerwise
from helpers.families import FAMILIES, write_family
from helpers.runs import gpt


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_block_at_a_time_is_the_model_bit_for_bit(tmp_path, name, dtype):
    write_family(name, tmp_path / name, tied=False)
    whole, parts = gpt(tmp_path / name).to(dtype).eval(), layerwise(tmp_path / name, 40, dtype)
    # the tables of positions are in float32 wherever a model is loaded
    whole.cos, whole.sin = whole.rope_cache()
    input_ids = torch.arange(60).view(2, 30)
    hidden = parts.embed(input_ids)
    for layer in range(2):
        with parts.block(layer) as block:
            hidden = parts.run(block, hidden)
        assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
    assert torch.equal(parts.lm_head.logits(parts.ln_f(hidden)), whole(input_ids))
