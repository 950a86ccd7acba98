"""The toy set-ups: a teacher's distribution over a few ids, and how long a student is trained on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NOISE_SEED = 1000
"""Added to a run's seed for its teacher's noise, so that noise and student are drawn apart."""


@dataclass(frozen=True)
class Setup:
    """A teacher and the training of a student on it; one step is what the paper calls an epoch."""

    title: str
    teacher: Callable[[int], Tensor]
    """Number of seeds -> one distribution for each, ``[seeds, vocab]`` in float64."""
    learning_rate: float
    """Of Adam."""
    steps: int
    looked_at: tuple[int, ...]
    """Steps after which teacher and student are drawn."""
    far_from: int | None = None
    """First id of the far tail, where there is one."""


def random_numbers(draw: Callable[..., Tensor], seeds: int, vocab: int, first_seed: int = 0) -> Tensor:
    """``[seeds, vocab]`` in float64, a row for each seed, so that a row does not depend on how many there are."""
    generators = [torch.Generator().manual_seed(first_seed + seed) for seed in range(seeds)]
    return torch.stack([draw(vocab, generator=generator, dtype=torch.float64) for generator in generators])


def two_gaussians(first_mean: float, second_mean: float, deviation: float) -> Callable[[int], Tensor]:
    """0.3 of one Gaussian and 0.5 of another at x = 0, 2, .. 98, normalised."""
    x = torch.arange(50, dtype=torch.float64) * 2
    first, second = (torch.exp(-((x - mean) ** 2) / (2 * deviation**2)) for mean in (first_mean, second_mean))
    density = 0.3 * first + 0.5 * second
    return lambda seeds: (density / density.sum()).repeat(seeds, 1)


def long_tail(seeds: int) -> Tensor:
    """Half of a Gaussian of deviation 16 at x = 0, 1.25, .. 98.75, with noise of 1 % at each id, normalised."""
    x = torch.arange(80, dtype=torch.float64) * 1.25
    noise = 1 + 0.01 * random_numbers(torch.randn, seeds, len(x), _NOISE_SEED)
    density = torch.exp(-(x**2) / (2 * 16**2)) * noise
    return density / density.sum(dim=-1, keepdim=True)


def one_token_head(seeds: int) -> Tensor:
    """0.6 on the first of 50 ids and the rest in equal shares, so that the first id alone is the head."""
    density = torch.full((seeds, 50), 0.4 / 49, dtype=torch.float64)
    density[:, 0] = 0.6
    return density


PAPER_SETUPS = {
    "bimodal": Setup("two Gaussians, bimodal", two_gaussians(25, 75, 10), 0.1, 200, (1, 10, 20, 50, 200)),
    "unimodal": Setup("two Gaussians, unimodal", two_gaussians(50, 50, 15), 0.1, 200, (1, 10, 20, 50, 200)),
    "long_tail": Setup("half a Gaussian, a long tail", long_tail, 0.2, 800, (1, 5, 10, 300), far_from=37),
}
"""The toy experiments of arXiv 2404.02657, with its rates and steps; it looks at the long tail after the same steps."""
SETUPS = {
    **PAPER_SETUPS,
    "one_token": Setup("a head of one id", one_token_head, 0.1, 200, (1, 10, 50, 200)),
}
