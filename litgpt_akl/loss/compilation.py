"""Functions as torch.compile fuses them, and whether it can."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType

import torch
from torch import Tensor


@cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works there; only a trial tells, since it needs a compiler and its headers."""
    try:
        torch.compile(lambda x: x.exp().sum(dim=-1), dynamic=True)(torch.ones(2, 8, device=device_type))
    except Exception:
        return False
    return True


def as_tensor(number: float, like: Tensor) -> Tensor:
    """A tensor of shape ``[]``; filled by the device itself, the host does not wait as it would for a copy."""
    return torch.full((), number, dtype=like.dtype, device=like.device)


def eager(function: Callable, *_, **switches: bool) -> Callable:
    return partial(function, **switches)


@cache
def compiled(function: FunctionType, *variant: bool, **switches: bool | Callable | None) -> Callable:
    """``function`` as torch.compile fuses it; what it is called with must have no Python float in it.

    torch.compile would make a symbol of the float, specialise the code to its value, and take that code from its cache
    for another value (pytorch issues 194976 and 197889).
    """
    # how much is compiled of a code object is limited, and all partials share one: each variant has its own
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **switches}
    fused = torch.compile(own, dynamic=True, fullgraph=True)

    def call(*args, **kwargs):
        try:
            return fused(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            warnings.warn(
                f"torch.compile has compiled as many variants of {function.__name__} as it may"
                f" ({torch._dynamo.config.recompile_limit}, torch._dynamo.config.recompile_limit). Others are computed"
                " without it, which is slower.",
                stacklevel=2,
            )
            return function(*args, **kwargs, **switches)

    return call
