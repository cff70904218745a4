"""Random operands of small sizes, the same for the same seed."""

import random

import torch


def normal(rng: random.Random, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def sizes(rng: random.Random, count: int, most: int = 5) -> list[int]:
    return [rng.randint(1, most) for _ in range(count)]


def ids(rng: random.Random, vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
