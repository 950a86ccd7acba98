"""Samples to look at a teacher with."""

import torch

from litgpt_akl.models.layerwise import LayerwiseModel, Sample
from litgpt_akl.models.weights import open_weights, read_config


def random_samples(lengths: list[int], ids: int, seed: int = 0) -> list[Sample]:
    """Of random ids; the last two thirds of each are its response."""
    generator, samples = torch.Generator().manual_seed(seed), []
    for length in lengths:
        input_ids = torch.randint(ids, (length,), generator=generator)
        positions = torch.arange(length // 3, length - 1)
        samples.append(Sample(input_ids, positions, input_ids[positions + 1]))
    return samples


def layerwise(directory, longest: int = 128, dtype: torch.dtype = torch.float32) -> LayerwiseModel:
    config = read_config(directory)
    return LayerwiseModel(config, open_weights(directory, config), torch.device("cpu"), dtype, longest)
