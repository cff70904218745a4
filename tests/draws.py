"""Eager torch with a program's draws put in: each operator that draws takes the next site of the step's seed."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autosp_aot.ops.random import uniform

aten = torch.ops.aten

# Operators that make a tensor, and what makes one like theirs; all others fill their first argument.
MAKING = {
    aten.bernoulli.default: torch.empty_like,
    aten.rand.default: torch.empty,
    aten.rand_like.default: torch.empty_like,
    aten.randint.default: lambda high, size, dtype=torch.int64, **_: torch.empty(size, dtype=dtype),
    aten.randint_like.default: lambda like, high, **_: torch.empty_like(like),
    aten.randn.default: torch.empty,
    aten.randn_like.default: torch.empty_like,
}


class Draws(TorchDispatchMode):
    """While it is active, operators that draw do so from `seed` (an i64 scalar), sites numbered as they are called."""

    def __init__(self, seed: Tensor):
        super().__init__()
        self.seed, self.sites = seed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {argument.name: argument.default_value for argument in func._schema.arguments}
        given |= dict(zip(given, args)) | kwargs
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("dropout_p") == 0:
            return func(*args, **kwargs)
        out = MAKING[func](*args, **kwargs) if func in MAKING else args[0]
        name = func._schema.name.removeprefix("aten::").removesuffix("_").removesuffix("_like")
        return out.copy_(self.drawn(name, out, given))

    def drawn(self, name: str, like: Tensor, given: dict) -> Tensor:
        if name == "bernoulli":
            return self.uniform(like, torch.float32) < given.get("p", given.get("self"))
        if name == "randint":
            return (self.uniform(like, torch.float64) * given["high"]).long()
        if name == "exponential":
            least = torch.finfo(like.dtype).eps / 2
            return (-torch.log1p(-self.uniform(like, like.dtype))).clamp_min(least) / given["lambd"]
        if name in ("rand", "uniform"):
            low, high = given.get("from", 0), given.get("to", 1)
            return self.uniform(like, like.dtype) * (high - low) + low
        assert name in ("randn", "normal"), name
        first, second = self.uniform(like, like.dtype), self.uniform(like, like.dtype)
        normal = (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)
        return normal * given.get("std", 1) + given.get("mean", 0)

    def uniform(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        self.sites += 1
        return uniform(self.seed, self.sites - 1, tuple(like.shape), (), dtype)
