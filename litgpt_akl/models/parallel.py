"""Models spread over processes by FSDP2, through the strategy of Fabric that serves CPU and CUDA alike.

With one process everything here is what its name says, without any communication.
"""

import ctypes
import sys
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.wrappers import is_wrapped
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_M_MMAP_THRESHOLD = -3
"""A parameter of glibc's mallopt: blocks from that size on are the system's own."""


def make_strategy(devices: int, num_nodes: int, hybrid_sharding: bool, offload_teacher: bool = False) -> Strategy | str:
    """Fabric's strategy for ``devices`` processes on each node.

    With ``hybrid_sharding`` every node holds whole models; with ``offload_teacher`` a frozen one's shards lie in CPU
    memory.
    """
    if devices * num_nodes == 1:
        return "auto"
    return ModelParallelStrategy(
        partial(parallelize, replicas=num_nodes if hybrid_sharding else 1, offload_teacher=offload_teacher),
        data_parallel_size=devices * num_nodes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def return_freed_memory() -> None:
    """Let glibc give freed blocks back to the system, on a CPU.

    It would keep them, and cut new ones from the end of its heap: a model of which one block at a time is whole would
    take more memory than if it were not sharded.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def parallelize(model: nn.Module, mesh: DeviceMesh, replicas: int, offload_teacher: bool = False) -> nn.Module:
    """Shard a GPT on the meta device: a block is gathered when it runs, and what is in no block when the model runs.

    The ``mesh`` is of all processes, which hold so many ``replicas``. With ``offload_teacher`` the shards of a frozen
    model lie in CPU memory until they are gathered.
    """
    mesh = _replicated(mesh.device_type, replicas, mesh.size() // replicas) if replicas > 1 else mesh["data_parallel"]
    # positions are float32 whatever the blocks compute in, and so are sums over processes
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    offloads = offload_teacher and bool(blocks_of(model)) and not any(p.requires_grad for p in model.parameters())
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offloads else OffloadPolicy()
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=place)
    # the loss reads the LM head inside of the forward, and the student's loss reads the teacher's after its forward
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=False)
    if offloads:
        # Fabric would make room for what is still on the meta device, for all shards at once, on the GPU
        model.to_empty(device="cpu")
        model.cos, model.sin = model.rope_cache(device=torch.device(mesh.device_type))
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A GPT's blocks; none of a head without a body."""
    return list(model.transformer.h) if hasattr(model, "transformer") else []


@lru_cache
def _replicated(device_type: str, replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def unshard(model: nn.Module) -> None:
    """Gather the parameters that are in no block, as the forward of the model would."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Let go of the parameters that a forward without a backward, or :func:`unshard`, has left gathered."""
    # of several teachers each is sharded by itself
    for root in getattr(model, "roots", [model]):
        if isinstance(root, FSDPModule):
            root.reshard()


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor] | None, trained_only: bool = False) -> None:
    """Give a model its parameters, or those that are not frozen; only process 0 has ``weights``.

    They are sent one at a time: PyTorch's ``set_model_state_dict`` has them all in memory at once.
    """
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad or not trained_only:
            parameter.copy_(_share_out(None if weights is None else weights[name], parameter, parameter.dtype))


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any] | None) -> None:
    """Give an optimizer the ``state_dict()`` of one whose tensors were whole; only process 0 has it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    described, tensors = saved, {}
    if saved is not None:
        described = saved | {"state": {number: dict(entries) for number, entries in saved["state"].items()}}
        for number, entries in saved["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                    # sent by itself, and described by its type
                    tensors[number, name], described["state"][number][name] = value, value.dtype
    described = broadcast_object(described)
    for number, entries in described["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.dtype):
                entries[name] = _share_out(tensors.get((number, name)), parameters[number], value)
    optimizer.load_state_dict(described)
    for number, entries in described["state"].items():
        loaded = optimizer.state[parameters[number]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dtype != loaded[name].dtype:
                # PyTorch has given it the parameter's type, in which half-precision training would go on with less
                loaded[name] = value.to(loaded[name].device)


def _share_out(tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of process 0, on the device and with the sharding of ``like``, which has its shape."""
    if not isinstance(like, DTensor):
        # a view of a file may not outlive it
        return tensor.to(like.device, dtype, copy=True)
    # shards may lie in CPU memory, but GPUs exchange what is on them
    device = like.device_mesh.device_type
    if tensor is None:
        tensor = torch.empty(like.shape, dtype=dtype, device=device)
    return distribute_tensor(tensor.to(device, dtype), like.device_mesh, like.placements)


def unwrap(model: nn.Module) -> nn.Module:
    """A model without Fabric's wrapper, which PyTorch's functions for states do not know."""
    return model.module if is_wrapped(model) else model


def gather_full(tensor: Tensor) -> Tensor:
    """A parameter, or what has its shape, as one tensor on the CPU; all processes must ask for it together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def rank() -> int:
    """Of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Wait for every process, however long that takes; other communication fails when one of them comes late.

    It goes before what processes exchange after one of them may have read or written for hours. One that has gone ends
    the wait with an error.
    """
    if world_size() > 1:
        distributed.barrier(_patient_group(distributed.group.WORLD))


@lru_cache
def _patient_group(everyone: distributed.ProcessGroup) -> distributed.ProcessGroup:
    # as in Lightning's rank_zero_first: only gloo has no limit but this
    return distributed.new_group(backend="gloo", timeout=timedelta(days=10000))


def all_reduce_max(fabric: L.Fabric, value: int) -> int:
    """The highest of all processes' values."""
    return all_reduce_max_each(fabric, [value])[0]


def all_reduce_max_each(fabric: L.Fabric, values: list[int]) -> list[int]:
    """At each place the highest of all processes' values; all give as many."""
    return all_reduce(torch.tensor(values, device=fabric.device), distributed.ReduceOp.MAX).tolist()


def all_reduce(values: Tensor, operation: distributed.ReduceOp) -> Tensor:
    """The tensor of all processes, in place: Fabric's waits at a barrier before, for which a GPU's work has to end."""
    if world_size() > 1:
        distributed.all_reduce(values, operation)
    return values


def all_gather_object(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Process 0's value."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]
