"""AdamW over flat buckets: one reduction of the gradients over all ranks, state in fp32, whole or shared out (ZeRO).

    .grad of every rank    partial sums, in the parameters' dtype
      flat                 [ a | b | part of c | 0 ]  up to BUCKET elements in fp32, cut through parameters
      reduce_scatter       each rank adds up its part, in the order of the ranks
      norm                 of all parts together, each element once
      ZeRO 0               all_gather of gradients; every rank steps everything
      ZeRO 1               each rank steps its part; all_gather of parameters, in their dtype

Both stages add and step alike, so they give the same bits. For fp64 parameters read fp64 in place of fp32.
"""

from collections.abc import Iterable
from itertools import groupby
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from autosp_aot.runtime.comm import Group

BUCKET = 2**22
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class ParameterRun(NamedTuple):
    """A run of a parameter's elements, `stop` excluded."""

    parameter: nn.Parameter
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """That run of a tensor shaped as the parameter."""
        return tensor.reshape(-1)[self.start : self.stop]

    def of_gradient(self) -> Tensor:
        assert self.parameter.grad is not None, "backward fills all gradients"
        return self.of(self.parameter.grad)


class Bucket:
    """Pieces of parameters of one dtype end to end, zeros up to a multiple of the ranks, and the optimizer's state.

    `part` is what of it this rank has state of. `master` holds parameters that are narrower than the state.
    """

    def __init__(self, pieces: list[ParameterRun], world: Group, zero: int):
        parameter = pieces[0].parameter
        self.pieces, self.dtype, self.device = pieces, parameter.dtype, parameter.device
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.sizes = [piece.stop - piece.start for piece in pieces]
        self.sizes.append(-sum(self.sizes) % world.size)
        share = sum(self.sizes) // world.size
        self.part = slice(share * world.rank, share * (world.rank + 1)) if zero else slice(None)
        own = self.flat(self.wide)[self.part]
        self.master = own.clone() if self.wide != self.dtype else None
        self.average, self.square, self.count = torch.zeros_like(own), torch.zeros_like(own), torch.zeros(())
        self.sums: Tensor | None = None

    def flat(self, dtype: torch.dtype, gradients: bool = False) -> Tensor:
        """Its parameters, or their gradients, as one new tensor."""
        flat = torch.empty(sum(self.sizes), dtype=dtype, device=self.device)
        *places, padding = flat.split(self.sizes)
        padding.zero_()
        for piece, place in zip(self.pieces, places):
            place.copy_(piece.of_gradient() if gradients else piece.of(piece.parameter))
        return flat

    def accumulate(self) -> None:
        """Add the gradients to `sums` where their own dtype is too narrow to add in."""
        if self.wide == self.dtype:
            return
        if self.sums is None:
            self.sums = torch.zeros(sum(self.sizes), dtype=self.wide, device=self.device)
        for piece, place in zip(self.pieces, self.sums.split(self.sizes)):
            place.add_(piece.of_gradient())
        self._release()

    def take(self) -> Tensor:
        """The sums of this rank's gradients so far, flat, which are let go here."""
        flat, self.sums = self.sums, None
        if flat is None:
            flat = self.flat(self.wide, gradients=True)
            self._release()
        return flat

    def _release(self) -> None:
        for piece in self.pieces:
            if piece.stop == piece.parameter.numel():
                piece.parameter.grad = None

    def step(self, gradient: Tensor, lr: float, weight_decay: float) -> Tensor:
        """Step this rank's part; its new values, in the state's dtype."""
        values = self.flat(self.wide)[self.part] if self.master is None else self.master
        adamw(
            [values], [gradient], [self.average], [self.square], [], [self.count], foreach=True, amsgrad=False,
            maximize=False, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay,
        )  # fmt: skip
        return values

    def write(self, flat: Tensor) -> None:
        """Give the parameters their new values, rounded to their dtype."""
        for piece, place in zip(self.pieces, flat.split(self.sizes)):
            piece.parameter.view(-1)[piece.start : piece.stop].copy_(place)


class AdamW:
    """torch's AdamW with torch's betas (0.9, 0.999) and eps (1e-8), over the ranks of `world`, which hold partial sums.

    It decays every parameter that it is given, as torch's does. It calls the functional form: constructing
    `torch.optim.AdamW` imports torch.compile, 1.7 s for nothing used here.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[nn.Parameter], world: Group, zero: int = 0, weight_decay: float = 0.01):
        self.world, self.zero, self.weight_decay = world, zero, weight_decay
        trained = sorted((p for p in parameters if p.requires_grad), key=lambda p: str(p.dtype))
        self.buckets = [
            Bucket(pieces, world, zero)
            for _, alike in groupby(trained, key=lambda p: p.dtype)
            for pieces in _buckets(list(alike))
        ]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Keep what is in `.grad` for a step of more micro-batches than this one."""
        for bucket in self.buckets:
            bucket.accumulate()

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0, clip: float | None = None) -> float:
        """Step along `scale` times the sum of all gradients that were left on all ranks, and let them go.

        Where their norm is above `clip` they are made that long, as `torch.nn.utils.clip_grad_norm_` does. Returns the
        norm before that.
        """
        parts = [self.world.reduce_scatter(bucket.take()) for bucket in self.buckets]
        squares = [torch.linalg.vector_norm(part).double().square() for part in parts]
        norm = scale * sqrt(self.world.sum(torch.stack(squares).sum()))
        factor = scale if clip is None else scale * min(clip / (norm + EPS), 1.0)
        parts.reverse()
        for bucket in self.buckets:
            part = parts.pop().mul_(factor)
            if self.zero:
                bucket.write(self.world.all_gather(bucket.step(part, lr, self.weight_decay).to(bucket.dtype)))
            else:
                bucket.write(bucket.step(self.world.all_gather(part), lr, self.weight_decay))
        return norm

    @torch.no_grad()
    def gradients(self, scale: float = 1.0) -> dict[nn.Parameter, Tensor]:
        """`scale` times the sum of all gradients that were left on all ranks, in the state's dtype, and let them go."""
        found: dict[nn.Parameter, Tensor] = {}
        for bucket in self.buckets:
            flat = self.world.all_gather(self.world.reduce_scatter(bucket.take())).mul_(scale)
            for piece, place in zip(bucket.pieces, flat.split(bucket.sizes)):
                whole = found.setdefault(piece.parameter, torch.empty_like(piece.parameter, dtype=bucket.wide))
                piece.of(whole).copy_(place)
        return found


def _buckets(parameters: list[nn.Parameter]) -> list[list[ParameterRun]]:
    """The parameters end to end, cut every BUCKET elements."""
    buckets: list[list[ParameterRun]] = []
    room = 0
    for parameter in parameters:
        start = 0
        while start < parameter.numel():
            if not room:
                buckets.append([])
                room = BUCKET
            stop = min(parameter.numel(), start + room)
            buckets[-1].append(ParameterRun(parameter, start, stop))
            room, start = room - (stop - start), stop
    return buckets
