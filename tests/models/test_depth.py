from copy import copy

import pytest
import torch
from helpers.calibration import layerwise, random_samples
from helpers.families import write_family
from helpers.runs import gpt
from litgpt.model import GPT
from torch.nn import ModuleList

from litgpt_akl.models import depth
from litgpt_akl.models.depth import DepthSearch, even_layers, influential_layers

LENGTHS = [40, 12, 25]


def of_layers(model: GPT, kept: list[int]) -> GPT:
    """The same model with some of its layers only."""
    student, indices = copy(model), model.config.rope_indices
    student._modules = {**model._modules, "transformer": copy(model.transformer)}
    student.transformer._modules = {**model.transformer._modules, "h": ModuleList(model.transformer.h[n] for n in kept)}
    student.config = copy(model.config)
    student.config.rope_indices = indices and [indices[layer] for layer in kept]
    return student


def forward_kl(teacher: torch.nn.Module, student: torch.nn.Module, samples: list, ids: int) -> float:
    """In nats per response token, from whole logits."""
    total = tokens = 0
    for sample in samples:
        p, q = (
            model(sample.input_ids[None])[0, sample.positions, :ids].double().log_softmax(dim=-1)
            for model in (teacher, student)
        )
        total += (p.exp() * (p - q)).sum().item()
        tokens += len(sample.positions)
    return total / tokens


@torch.no_grad()
@pytest.mark.parametrize("keep_ends", [True, False])
@pytest.mark.parametrize("name", ["glassllm", "Gemma-3-1b-it", "phi-2", "Mixtral-8x7B-v0.1"])
def test_each_step_removes_the_layer_that_is_missed_least(teacher_dir, tmp_path, name, keep_ends):
    """Against students that are run as a whole."""
    directory = teacher_dir
    if name != "glassllm":
        directory = tmp_path / name
        write_family(name, directory, tied=False, layers=4)
    model, teacher, done = layerwise(directory), gpt(directory).eval(), []
    ids = model.config.padded_vocab_size - 10
    samples = random_samples(LENGTHS, ids)
    search = DepthSearch(model, samples, ids)
    removals = search.remove(layers := 2 if keep_ends else 1, keep_ends, done.append)
    assert sum(done) == search.work(layers, keep_ends)
    kept = [0, 1, 2, 3]
    for layer, loss in removals:
        losses = {}
        for each in kept[1:-1] if keep_ends else kept:
            student = of_layers(teacher, [other for other in kept if other != each])
            losses[each] = forward_kl(teacher, student, samples, ids)
        assert layer == min(losses, key=losses.get)
        assert loss == pytest.approx(losses[layer], rel=1e-4)
        kept.remove(layer)
    assert len(kept) == layers


def test_models_in_groups_and_in_parts_are_those_that_go_together(teacher_dir, monkeypatch):
    model, samples = layerwise(teacher_dir), random_samples(LENGTHS, 1000)
    together = DepthSearch(model, samples, 1000).remove(1, keep_ends=False)
    # two models' hidden states of 77 tokens, and one sample's of one model in a block
    monkeypatch.setattr(depth, "STATES_BYTES", 2 * sum(LENGTHS) * 128 * 4)
    monkeypatch.setattr(depth, "TOGETHER", 40)
    done, search = [], DepthSearch(model, samples, 1000)
    found = search.remove(1, False, done.append)
    assert sum(done) == search.work(1, False)
    assert [removal.layer for removal in found] == [removal.layer for removal in together]
    assert [removal.forward_kl for removal in found] == pytest.approx([each.forward_kl for each in together], rel=1e-5)


@pytest.mark.parametrize("room", [1000, 22])
def test_what_comes_before_a_removed_layer_is_not_run_again(tmp_path, monkeypatch, room):
    """Against searches that begin anew after each removal, bit for bit; with room for all that is known or for some."""
    write_family("Llama-3.2-1B", tmp_path / "teacher", tied=False, layers=8)
    model, samples, runs, done = layerwise(tmp_path / "teacher"), random_samples(LENGTHS, 500), [], []
    monkeypatch.setattr(depth, "STATES_BYTES", room * sum(LENGTHS) * model.config.n_embd * 4)
    anew: list[depth.Removal] = []
    for layers in range(7, 1, -1):
        anew = DepthSearch(model, samples, 500).remove(layers, False, removed=anew)
    run = model.run
    monkeypatch.setattr(model, "run", lambda block, hidden: runs.append(len(hidden)) or run(block, hidden))
    search = DepthSearch(model, samples, 500)
    assert search.remove(2, False, done.append) == anew
    assert sum(done) == search.work(2, False)
    kept, known, fewest = [*range(8)], 0, 8
    for removal in anew:
        # before a layer there are the models that lack an earlier one, and the one that lacks none yet
        fewest += sum(place + 1 for place in range(known, len(kept)))
        known = kept.index(removal.layer)
        kept.remove(removal.layer)
    assert sum(done) > sum(runs) >= len(LENGTHS) * fewest
    assert (sum(runs) == len(LENGTHS) * fewest) == (room == 1000)


def test_layers_of_low_influence_go():
    influence = torch.tensor([0.1, 0.9, 0.2, 0.2, 0.5, 0.05])
    assert influential_layers(influence, 4, keep_ends=True) == [0, 1, 4, 5]
    assert influential_layers(influence, 3, keep_ends=True) == [0, 1, 5]
    assert influential_layers(influence, 4, keep_ends=False) == [1, 2, 3, 4]
    assert influential_layers(influence, 6, keep_ends=True) == [0, 1, 2, 3, 4, 5]


def test_even_layers_reach_from_the_first_to_the_last():
    assert even_layers(4, 30) == [0, 10, 19, 29]
    assert even_layers(1, 30) == [29]
