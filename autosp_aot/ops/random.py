"""Random numbers that follow from (seed, site, position) alone, so that any part of a draw can be made anywhere.

SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) read by index instead of
in order: number i of the stream of a state is `mix(state + (i + 1) * GAMMA)`. Streams are nested:

    seed of a step   number `step` of the stream of the user's seed
    state of a site  number `site` of the stream of the step's seed; each drawing operator is a site
    64 random bits   number `position` of the stream of the site; the position is the element's in the whole value

Integer arithmetic that wraps at 64 bits, the same bits on every device. At site UNDRAWN all draws are zero, so that
nothing is dropped: as such a program can be compared with one that draws from another generator.
"""

from math import log2, prod

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIXERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
LAST_SHIFT = 31
UNDRAWN = -1
BLOCK = 2**18  # positions at once: what is live besides the result is twice 2 MiB


def step_seed(seed: int, step: int) -> Tensor:
    """The input `seed` (i64 scalar) of a step's program."""
    return _stream(torch.tensor(seed), torch.tensor(step))


def uniform(
    seed: Tensor, site: int, shape: tuple[int, ...], box: tuple[int, ...], dtype: torch.dtype, device=None
) -> Tensor:
    """Draws from [0, 1) for a value of the whole `shape`, or for a rank's box of it.

    `box` is () for the whole, else (dim, outer, start, stop): of each of the `outer` parts of a dim the positions
    start..stop. Multiples of 2^-d, d the digits of the dtype, as torch draws them.
    """
    local, lead, run, stride, offset = _layout(shape, box)
    if site == UNDRAWN:
        return torch.zeros(local, dtype=dtype, device=device)
    out = torch.empty((lead, run), dtype=dtype, device=device)
    state = _stream(seed, torch.full((), site)).to(out.device)
    digits = 1 - int(log2(torch.finfo(dtype).eps))
    for rows in _blocks(lead, max(1, BLOCK // max(run, 1))):
        first = torch.arange(rows.start, rows.stop, device=out.device).mul_(stride).add_(offset + 1)
        first = first.mul_(GAMMA).add_(state).unsqueeze(1)
        for columns in _blocks(run, BLOCK):
            bits = _mix(first + torch.arange(columns.start, columns.stop, device=out.device).mul_(GAMMA))
            out[rows, columns] = _shifted(bits, 64 - digits)
    return out.mul_(2.0**-digits).view(local)


def keep(seed: Tensor, site: int, position: Tensor, p: float) -> Tensor:
    """Where the fp32 draw of `uniform` is below 1 - p, at each position (i64) of the whole value; bool, same shape."""
    if site == UNDRAWN:
        return torch.ones_like(position, dtype=torch.bool)
    bits = _stream(_stream(seed, torch.full((), site)).to(position.device), position)
    return _shifted(bits, 40).float().mul_(2.0**-24) < 1 - p


def _layout(shape: tuple[int, ...], box: tuple[int, ...]) -> tuple[tuple[int, ...], int, int, int, int]:
    """The box as `lead` runs of `run` positions, `stride` apart, the first at `offset`; and its shape."""
    if not box:
        return shape, 1, prod(shape), 0, 0
    dim, outer, start, stop = box
    inner = prod(shape[dim + 1 :])
    local = (*shape[:dim], outer * (stop - start), *shape[dim + 1 :])
    return local, prod(shape[:dim]) * outer, (stop - start) * inner, shape[dim] // outer * inner, start * inner


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _stream(state: Tensor, index: Tensor) -> Tensor:
    """Number `index` of the stream of `state`."""
    return _mix((index + 1).mul_(GAMMA).add_(state))


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place: every bit of the argument changes half of the bits of the result."""
    for shift, factor in MIXERS:
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    return bits.bitwise_xor_(_shifted(bits, LAST_SHIFT))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """The bits of a 64-bit number moved right, zeros coming in."""
    return (bits >> by).bitwise_and_(2 ** (64 - by) - 1)
