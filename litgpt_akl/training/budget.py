"""What a student may cost: parameters, memory of its weights, or time for a token; and how many layers that allows."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from litgpt_akl.messages import UserError, progress_bar
from litgpt_akl.models.candidates import Candidate
from litgpt_akl.models.student_checkpoint import TeacherFiles
from litgpt_akl.models.student_config import full_sizes
from litgpt_akl.models.token_time import Speed, TokenTime, measure_token_time, quartiles
from litgpt_akl.teacher.cache_size import readable
from litgpt_akl.training.student_making import StudentMaking, bytes_of


class StudentCosts:
    """What students of a teacher cost, by how many layers they have and of what sizes."""

    def __init__(self, making: StudentMaking, teacher: TeacherFiles) -> None:
        self.teacher, self.full = teacher, full_sizes(teacher.config)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if making.precision == "bf16-true" else torch.float32
        self._times: dict[tuple[int, ...], TokenTime] = {}
        self._advance: Callable[[], object] = lambda: None

    def parameters(self, layers: int, sizes: dict[str, int]) -> int:
        """How many a student has."""
        n_layer = self.teacher.config.n_layer
        # all blocks of a model that may be narrower are of one size, and one is counted more quickly than many
        size = self.teacher.size_of(range(n_layer if sizes == self.full else 1), sizes)
        return size.whole if sizes == self.full and layers == n_layer else size.root + layers * size.block

    def memory(self, layers: int, sizes: dict[str, int]) -> int:
        """Bytes of a student's weights as they are written: in the teacher's type, of several types the widest."""
        return self.parameters(layers, sizes) * self.teacher.bytes_per_parameter

    def token_time(self, layers: int, sizes: dict[str, int]) -> float:
        """For the next token of one answer, as a share of the teacher's; of sizes that are known nothing is timed."""
        key = (*sizes.values(),)
        if key not in self._times:
            self._times[key] = self._measure_token_time(sizes)
        return 1 / self._times[key].speed(layers).ratio

    def speeds(self, candidates: Sequence[Candidate]) -> tuple[float, list[Speed]]:
        """The teacher's tokens in a second, and the speed of students beside it, all timed anew."""
        with self.progress(len(candidates)):
            times = [self._measure_token_time(candidate.sizes) for candidate in candidates]
        seconds, _ = quartiles(torch.cat([time.reference for time in times]))
        return 1 / seconds, [time.speed(each.layers) for time, each in zip(times, candidates, strict=True)]

    @contextmanager
    def progress(self, total: int | None = None) -> Iterator[None]:
        """Shows of how many sizes the time is measured inside."""
        with progress_bar(desc="measuring speed", total=total, unit=" sizes", leave=False) as bar:
            self._advance = bar.update
            yield
        self._advance = lambda: None

    def _measure_token_time(self, sizes: dict[str, int]) -> TokenTime:
        every = range(self.teacher.config.n_layer)
        configs = (self.teacher.config_of(every, each) for each in (sizes, self.full))
        found = measure_token_time(*configs, self._device, self._dtype)
        self._advance()
        return found


class ParameterBudget:
    """``--params``: a share of the teacher's parameters, or a number."""

    def __init__(self, params: float, costs: StudentCosts) -> None:
        self._given, self._all = params, costs.parameters(costs.teacher.config.n_layer, costs.full)
        self.cost = costs.parameters
        self.limit = params * self._all if params <= 1 else params

    def refuse(self, lowest: float, what: str) -> UserError:
        """An error that names what has the ``lowest`` cost, and a budget that allows it."""
        told = f"--params {self._given} are {self.limit:,.0f} parameters, and {what} have {lowest:,}."
        return UserError(f"{told}\nGive --params {math.ceil(lowest / self._all * 100) / 100:.2f} or more.")


class MemoryBudget:
    """``--memory``: bytes of the weights as they are written."""

    def __init__(self, memory: str, costs: StudentCosts) -> None:
        self._given, self.cost, self.limit = memory, costs.memory, bytes_of(memory)

    def refuse(self, lowest: float, what: str) -> UserError:
        """An error that names what has the ``lowest`` cost, and a budget that allows it."""
        told = f"--memory {self._given}, but the weights of {what} take {readable(lowest)}."
        return UserError(f"{told}\nGive --memory {math.ceil(lowest / 1e5) / 10}MB or more.")


class SpeedBudget:
    """``--speed``: a multiple of the tokens of one answer that the teacher writes in a second, on this device."""

    def __init__(self, speed: float, costs: StudentCosts) -> None:
        self._given, self.cost, self.limit = speed, costs.token_time, 1 / speed

    def refuse(self, lowest: float, what: str) -> UserError:
        """An error that names what has the ``lowest`` cost, and a budget that allows it, also when it is timed anew."""
        told = f"--speed {self._given:g}, but {what} write {1 / lowest:.2f} times as many tokens in a second."
        safe = math.floor(8 / lowest) / 10
        return UserError(f"{told}\nGive {f'--speed {safe} or less' if safe > 1 else '--params in its place'}.")


Budget = ParameterBudget | MemoryBudget | SpeedBudget


def find_budget(making: StudentMaking, costs: StudentCosts) -> Budget | None:
    """The one that is given; None if layers are given in its place."""
    kinds = {"params": ParameterBudget, "memory": MemoryBudget, "speed": SpeedBudget}
    given = ((kind, value) for name, kind in kinds.items() if (value := getattr(making, name)) is not None)
    return next((kind(value, costs) for kind, value in given), None)


def least_layers(making: StudentMaking, teacher: TeacherFiles) -> int:
    """How few layers a student may have: the first and the last, if they are kept."""
    keeps_both = making.data is not None and making.method != "even" and making.keep_ends
    return 2 if keeps_both and teacher.config.n_layer > 1 else 1


def refuse_budget(budget: Budget, making: StudentMaking, teacher: TeacherFiles, sizes: dict[str, int]) -> UserError:
    """An error: even as few layers as may be, of these sizes, cost more."""
    least = least_layers(making, teacher)
    return budget.refuse(
        budget.cost(least, sizes), f"{least} of {teacher.config.n_layer} layers with embeddings and LM head"
    )


def count_layers(
    making: StudentMaking, teacher: TeacherFiles, sizes: dict[str, int], budget: Budget | None
) -> int | list[int]:
    """How many layers to keep, or which, in a student of these sizes.

    Raises:
        UserError: these are no layers of the teacher, or no number of layers is as small as it should be.
    """
    layers, n_layer, least = making.layers, teacher.config.n_layer, least_layers(making, teacher)
    if budget is not None:
        every = range(n_layer, least - 1, -1)
        layers = next((number for number in every if budget.cost(number, sizes) <= budget.limit), None)
        if layers is None:
            raise refuse_budget(budget, making, teacher, sizes)
    if isinstance(layers, list):
        _check_numbers(layers, n_layer)
    elif layers is None:
        layers = n_layer
    elif not least <= layers <= n_layer:
        ends = " The first and the last stay unless --keep_ends is false." if least > 1 and layers == 1 else ""
        raise UserError(
            f"layers is {layers}, but the teacher has {n_layer} layers. Give a number of {least} to {n_layer}.{ends}"
        )
    return layers


def _check_numbers(layers: list[int], n_layer: int) -> None:
    if not layers:
        raise UserError(f"layers is empty. Give at least one of the teacher's layers, 0 to {n_layer - 1}.")
    outside = [layer for layer in layers if not 0 <= layer < n_layer]
    if outside:
        raise UserError(
            f"layers names {outside}, but the teacher's {n_layer} layers are numbered 0 to {n_layer - 1}. "
            "Leave out what is not there."
        )
    if layers != sorted(set(layers)):
        raise UserError(f"layers is {layers}: not rising, or a layer twice. Give {sorted(set(layers))}.")
