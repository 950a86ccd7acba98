"""The optimizer of a run and its learning rate; and a trial on small parameters of whether and how a run can use it.

FSDP2 hands an optimizer DTensors, and not every operation has a rule for them. Which have one depends on PyTorch's
release and on the optimizer's options, and the optimizer may be anybody's: only a trial tells.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from litgpt.utils import instantiate_torch_optimizer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from litgpt_akl.messages import UserError, reason

HOW_IT_WORKS = {"fused", "foreach", "capturable", "differentiable"}
"""Options of an optimizer that PyTorch can fuse, which do not go with each other."""


def make_optimizer(optimizer: str | dict, student: torch.nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """LitGPT's way from a name, or class_path and init_args, to an optimizer of what a student trains.

    With ``fused`` one that PyTorch has fused is fused, unless its config says how it is to work: on a CPU a fused AdamW
    takes a fifth of the time. For where it cannot be, see :func:`check_optimizer`. Raises UserError if there is none.
    """
    told = isinstance(optimizer, dict) and not HOW_IT_WORKS.isdisjoint(optimizer["init_args"])
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if isinstance(optimizer, dict):
        # LitGPT writes into them
        optimizer = {**optimizer, "init_args": {**optimizer["init_args"]}}
    try:
        return instantiate_torch_optimizer(optimizer, trained, **({"fused": True} if fused and not told else {}))
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--optimizer {optimizer!r} cannot be made: {error}.\nGive a class of torch.optim, such as AdamW, or its"
            " class_path and init_args."
        ) from error


def make_scheduler(optimizer: torch.optim.Optimizer, warmup: int, steps: int, min_lr: float) -> LambdaLR:
    """Linear warm-up to each group's rate, then a cosine down to ``min_lr``, above which it lies (else UserError)."""

    def schedule(highest: float) -> Callable[[int], float]:
        floor = min_lr / highest if highest > 0 else 0.0

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        return factor

    rates = [group["lr"] for group in optimizer.param_groups]
    if min_lr > min(rates):
        raise UserError(
            f"--train.min_lr {min_lr} is above the optimizer's learning rate {min(rates)}.\n"
            "Lower min_lr, or raise the optimizer's lr."
        )
    return LambdaLR(optimizer, [schedule(rate) for rate in rates])


STEPS, RATE = 2, 0.01
TOLERANCE = 1e-3
"""By how much a step may differ on shared parameters, as a part of the largest change of any number."""


def check_optimizer(
    optimizer: str | dict,
    *,
    min_lr: float,
    vectors: bool,
    dtype: torch.dtype,
    devices: int,
    num_nodes: int,
    cuda: bool,
) -> bool:
    """See that an optimizer can take a run's steps; whether it is to be fused, if PyTorch has it fused.

    Raises UserError if it cannot be made or takes no steps; or on parameters that processes share none, or others.

    Args:
        optimizer: of the command, as ``min_lr``, ``devices`` and ``num_nodes``.
        vectors: whether not only matrices are trained.
        dtype: of the student.
        cuda: whether the devices are GPUs; they are not asked.
    """
    name = optimizer if isinstance(optimizer, str) else optimizer["class_path"]
    _check_names(name, {} if isinstance(optimizer, str) else optimizer["init_args"])
    starts = small_parameters(vectors)
    make_scheduler(make_optimizer(optimizer, _model(starts)), warmup=0, steps=1, min_lr=min_lr)
    try:
        _changes(optimizer, [start.to(dtype) for start in starts], True, cuda)
    except Exception as error:
        raise UserError(
            f"--optimizer {name} can take no steps here: {reason(error)}.\nUse another one, such as AdamW."
        ) from error
    if devices * num_nodes == 1:
        return True
    expected, failure = _changes(optimizer, starts, True, cuda), ""
    with _absent_processes() as mesh:
        wanted = [_share(change, mesh).to_local() for change in expected]
        limit = TOLERANCE * max(change.abs().max() for change in expected)
        for fused in (True, False):
            try:
                found = _changes(optimizer, starts, fused, cuda, mesh)
            except Exception as error:
                failure = f"parameters that processes share are too much for it ({reason(error).rstrip('.')})"
                continue
            if all(((one - other).abs() <= limit).all() for one, other in zip(found, wanted, strict=True)):
                return fused
            failure = "on parameters that processes share it takes other steps than on whole ones"
    raise UserError(
        f"--optimizer {name} with --devices {devices} --num_nodes {num_nodes}: {failure}.\nUse one device, or another"
        " optimizer, such as AdamW."
    )


def _check_names(class_path: str, options: dict[str, Any]) -> None:
    """See that there is such an optimizer, and that it takes these options; raises UserError."""
    module, _, name = class_path.rpartition(".")
    module = module or "torch.optim"
    try:
        chosen = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        near = "".join(f"; did you mean {near}?" for near in get_close_matches(name, dir(torch.optim), n=1))
        raise UserError(
            f"--optimizer {class_path} cannot be made: {module} has no class {name}{near or '.'}\nGive a class of"
            " torch.optim, such as AdamW, or the import path of another one."
        ) from None
    taken = [*inspect.signature(chosen).parameters.values()][1:]
    names = [parameter.name for parameter in taken]
    for option, value in options.items():
        if option not in names and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in taken):
            raise UserError(f"--optimizer.{option} {value}: {name} has no such option.\nIt takes {', '.join(names)}.")
    rate = options.get("lr", 1.0)
    if not isinstance(rate, Tensor) and not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise UserError(
            f"--optimizer.lr must be a number above 0, got {rate}.\nGive a learning rate such as --optimizer.lr 1e-5."
        )


def small_parameters(vectors: bool) -> list[Tensor]:
    """Matrices such as a run trains, and a vector if it does not train adapters alone; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(50, 20), (20, 50), (50,)][: 3 if vectors else 2]
    # larger towards their ends, so that it shows if something is computed of one share alone
    return [torch.randn(shape, generator=generator) * torch.arange(shape[-1]) / 10 for shape in shapes]


def _model(parameters: list[Tensor]) -> nn.Module:
    return nn.ParameterList(map(nn.Parameter, parameters))


def _share(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    # nothing is sent: every process has the whole
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def _changes(
    optimizer: str | dict, starts: list[Tensor], fused: bool, cuda: bool, mesh: DeviceMesh | None = None
) -> list[Tensor]:
    """By how much some steps change parameters, or this process's shares of them."""

    def placed(tensor: Tensor) -> Tensor:
        return tensor.clone() if mesh is None else _share(tensor, mesh)

    model = _model([placed(start) for start in starts])
    tried = make_optimizer(optimizer, model, fused)
    for group in tried.param_groups:
        group["lr"] = RATE
        if cuda and not group.get("fused") and group.get("foreach", True) is None:
            # PyTorch's own choice on a GPU
            group["foreach"] = True
    for step in range(STEPS):
        for parameter, start in zip(model, starts, strict=True):
            parameter.grad = placed(start.flip(0) * (step + 0.5))
        tried.step()
    changes = [parameter.detach() - placed(start) for parameter, start in zip(model, starts, strict=True)]
    return [change.to_local() if isinstance(change, DTensor) else change for change in changes]


@contextmanager
def _absent_processes() -> Iterator[DeviceMesh]:
    """This process as one of two, or of as many as there are, whose collectives do nothing.

    An optimizer that needs them thus takes other steps.
    """
    # the import makes the backend known to older releases of PyTorch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        group = distributed.new_group(backend="fake")
    else:
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        group = distributed.group.WORLD
    try:
        # what PyTorch has found out for a mesh it remembers by its names, too
        yield DeviceMesh.from_group(group, "cpu", mesh_dim_names=("trial",))
    finally:
        distributed.destroy_process_group(group)
