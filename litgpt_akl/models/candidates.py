"""Students that a budget allows: of fewer layers, narrower ones, and of some of both."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import NamedTuple

from litgpt.config import Config

from litgpt_akl.messages import UserError
from litgpt_akl.models.student_config import FAMILIES, IN_STEP, full_sizes, student_sizes

WAYS = (("mlp",), ("width",), ("mlp", "heads"), ("width", "mlp"), ("experts",), ("width", "mlp", "heads"))
"""What may be narrower, beside fewer layers: sizes of one way are cut by the same share."""
SHARES = [number / 32 for number in range(31, 7, -1)]
"""Of the teacher's sizes, from which those that are multiples of 64 (of 8 below 512) follow."""
USED = 0.9
"""Share of the budget that a narrower student uses at least."""


class Candidate(NamedTuple):
    """A student that could be made."""

    layers: int
    sizes: dict[str, int]
    cost: float
    """In the unit of the budget, such as parameters."""


def form_candidates(
    config: Config,
    kind: str | None,
    budget: float,
    *,
    least: int,
    count: int,
    cost: Callable[[int, dict[str, int]], float],
) -> list[Candidate]:
    """Up to so many students that cost at most ``budget``, and of at least as many layers as ``least``.

    The first one only has fewer layers, if that is enough. The others have more, and are as wide as is allowed then:
    ways to be narrower take turns, and of each the numbers of layers are far from one another.

    Args:
        config: the teacher's.
        kind: the teacher's model_type, if it has a config.json.
        budget: what a student costs at most.
        least: layers of a student at least.
        count: students at most.
        cost: of a student of so many layers and of these sizes, in parameters, bytes or time.
    """
    whole, all_layers = full_sizes(config), range(config.n_layer, least - 1, -1)
    fitting = next((layers for layers in all_layers if cost(layers, whole) <= budget), None)
    depth = [] if fitting is None else [Candidate(fitting, whole, cost(fitting, whole))]
    deeper, by_way = [layers for layers in all_layers if layers > (fitting or 0)], []
    for way in _ways_of(kind):
        widths = [*_widths(config, kind, way)]
        if not (widths and deeper and cost(deeper[-1], widths[-1]) <= budget):
            continue
        found = [_widest(layers, widths, budget, cost) for layers in deeper]
        within = [each for each in found if each is not None and each.cost >= USED * budget]
        # of equally wide ones the deepest, which comes first
        deepest = {tuple(each.sizes.values()): each for each in reversed(within)}
        by_way.append([*deepest.values()])
    return (depth + _taking_turns(by_way, count))[:count]


def _ways_of(kind: str | None) -> list[tuple[str, ...]]:
    """Ways to be narrower that a family has; where width and heads go together a way has both or neither."""
    if FAMILIES.get(kind) != IN_STEP:
        return [*WAYS]
    together = ("width", "heads")
    return [*dict.fromkeys((*together, *sorted({*way} - {*together})) if {*way} & {*together} else way for way in WAYS)]


def _widths(config: Config, kind: str | None, way: tuple[str, ...]) -> Iterable[dict[str, int]]:
    """Sizes that are narrower in a way, from the widest on; those that the family does not allow are left out."""
    previous = full_sizes(config)
    for share in SHARES:
        wanted = dict.fromkeys(way, share)
        if FAMILIES.get(kind) == IN_STEP and "heads" in way:
            heads = round(share * config.n_head)
            wanted |= {"heads": heads, "width": heads * config.head_size}
        try:
            sizes = student_sizes(config, wanted, kind)
        except UserError:
            continue
        if sizes != previous and all(sizes[name] < full_sizes(config)[name] for name in way):
            yield sizes
        previous = sizes


def _widest(
    layers: int, widths: list[dict[str, int]], budget: float, cost: Callable[[int, dict[str, int]], float]
) -> Candidate | None:
    """The first of sizes that become narrower which the budget allows; few are looked at, since each may be timed."""
    first = bisect_left(widths, True, key=lambda sizes: cost(layers, sizes) <= budget)
    return Candidate(layers, widths[first], cost(layers, widths[first])) if first < len(widths) else None


def _taking_turns(by_way: list[list[Candidate]], count: int) -> list[Candidate]:
    """One of each way after the other: first that of middle depth, then those farthest from all that were taken."""
    left, taken = [[*way] for way in by_way if way], []
    of_way: list[list[Candidate]] = [[] for _ in left]
    while len(taken) < count and any(left):
        for way, own in zip(left, of_way, strict=True):
            if not way:
                continue
            if own:
                best = max(way, key=lambda each: min(abs(each.layers - other.layers) for other in own))
            else:
                best = way[len(way) // 2]
            way.remove(best)
            own.append(best)
            if best not in taken:
                taken.append(best)
    return taken[:count]
