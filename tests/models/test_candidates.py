"""Students that a budget allows, of every family."""

import pytest
from litgpt.config import Config

from litgpt_akl.models.candidates import Candidate, form_candidates
from litgpt_akl.models.model_size import measure_size
from litgpt_akl.models.student_config import full_sizes, student_config

CASES = [
    ("Llama-3.2-1B", "llama", {"mlp", "width", "mlp heads", "width mlp", "width mlp heads"}),
    ("Gemma-2-2b", "gemma2", {"mlp", "width", "mlp heads", "width mlp", "width mlp heads"}),
    ("pythia-410m", "gpt_neox", {"mlp", "width heads", "width mlp heads"}),
    ("falcon-7b", "falcon", {"mlp", "width heads", "width mlp heads"}),
    ("Mixtral-8x7B-v0.1", "mixtral", {"mlp", "width", "mlp heads", "width mlp", "experts", "width mlp heads"}),
    ("stablelm-base-alpha-3b", "stablelm", set()),
]


def size_of(config: Config, layers: int, sizes: dict[str, int], tied: bool = False) -> int:
    return measure_size(student_config(config, range(layers), sizes), tied).whole


def form(config: Config, kind: str, share: float, count: int, least: int = 2) -> tuple[list[Candidate], float]:
    """Candidates of a share of the teacher's parameters, and that number; blocks are counted as make_student does."""
    budget = share * size_of(config, config.n_layer, full_sizes(config))

    def parameters(layers: int, sizes: dict[str, int]) -> int:
        of_one, of_two = (size_of(config, number, sizes) for number in (1, 2))
        return of_one + (layers - 1) * (of_two - of_one)

    return form_candidates(config, kind, budget, least=least, count=count, cost=parameters), budget


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize(("name", "kind", "ways"), CASES)
def test_candidates_fit_the_budget_and_the_family(name, kind, ways, share):
    # experts take their time
    config = Config.from_name(name, **({"n_layer": 12} if name == "Mixtral-8x7B-v0.1" else {}))
    whole = full_sizes(config)
    candidates, budget = form(config, kind, share, 20)
    assert len({(*each.sizes.values(),) for each in candidates}) == len(candidates)
    first, *others = candidates
    assert first.sizes == whole and first.layers < config.n_layer
    found = {" ".join(name for name in whole if each.sizes[name] < whole[name]) for each in others}
    # few groups of heads leave too much of the budget unused where all is to be cut a little
    assert found == (ways - {"width mlp heads"} if (kind, share) in [("gemma2", 0.8), ("mixtral", 0.8)] else ways)
    assert bool(ways) == (len(candidates) > 10) and len(candidates) <= 20
    for each in candidates:
        assert each.cost == size_of(config, each.layers, each.sizes) <= budget
        assert each is first or each.cost >= 0.9 * budget and each.layers > first.layers
        assert each.sizes["heads"] % config.n_query_groups == 0 or config.n_query_groups == config.n_head
        step = config.head_size if kind in ("gpt_neox", "falcon") else 64
        assert each.sizes["width"] % step == 0 and (each.sizes["mlp"] % 64 == 0 or each.sizes["mlp"] == whole["mlp"])
        if kind in ("gpt_neox", "falcon"):
            assert each.sizes["width"] == each.sizes["heads"] * config.head_size


def test_ways_take_turns_and_depths_are_spread():
    config = Config.from_name("Llama-3.2-3B")
    candidates, _ = form(config, "llama", 0.7, 11)
    assert [each.layers for each in candidates[:1]] == [17]
    by_way = {}
    for each in candidates[1:]:
        way = tuple(name for name, size in full_sizes(config).items() if each.sizes[name] < size)
        by_way.setdefault(way, []).append(each.layers)
    assert len(by_way) == 5 and {len(layers) for layers in by_way.values()} <= {1, 2, 3}
    assert all(len(layers) == 1 or abs(layers[0] - layers[1]) >= 4 for layers in by_way.values())
    assert form(config, "llama", 0.7, 3)[0] == candidates[:3]


def test_few_are_all_there_are():
    config = Config.from_name("pythia-14m")
    assert [each.layers for each in form(config, "gpt_neox", 1.0, 5)[0]] == [6]
    # embeddings and head alone are more
    assert form(config, "gpt_neox", 0.1, 5)[0] == []
    # too few for whole layers, but not for narrower ones
    narrow, _ = form(config, "gpt_neox", 0.8, 5)
    assert narrow and all(each.sizes["width"] < config.n_embd for each in narrow)
