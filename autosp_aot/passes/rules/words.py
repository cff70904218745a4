"""Rules and strategies in words: factors as letters, upper case where a factor must be whole.

    aten.mm        a b, b c -> a c         a=26 b=32 c=48
    aten.reshape   a b C -> (a b) C        a dim of two factors
    attention      b may be seen as b/4    every four positions as one: query heads and their key/value head
    convolution    e may be seen as e*2+3  place e reads three places from 2e on
"""

from string import ascii_lowercase

from autosp_aot.passes.rules.spec import Axis, Dims, Spec, Strategy
from autosp_aot.placement import Bounds, Placement, disjoint

RANKS_SHOWN = 4


def rule_text(spec: Spec) -> str:
    """The factors of every dim of operands and results."""
    sides = [", ".join(_dims(spec, dims) for dims in tensors) for tensors in (spec.operands, spec.results)]
    return " -> ".join(sides)


def factors_text(spec: Spec) -> str:
    """The factors' sizes, and which of them must be whole."""
    sizes = " ".join(f"{factor(spec, at)}={extent}" for at, extent in enumerate(spec.extents))
    whole = [factor(spec, at) for at in sorted(spec.whole)]
    return f"{sizes}; never cut: {' '.join(whole)}" if whole else sizes


def factor(spec: Spec, at: int) -> str:
    """The letter of a factor."""
    letter = ascii_lowercase[at % 26] + str(at // 26 or "")
    return letter.upper() if at in spec.whole else letter


def strategy_text(spec: Spec | None, strategy: Strategy) -> str:
    """What a strategy does."""
    if spec is None or strategy.factor is None:
        text = "the whole on every rank"
    else:
        inside = f" in each of {strategy.outer} parts" if strategy.outer != 1 else ""
        text = f"{factor(spec, strategy.factor)} cut at {bounds_text(strategy.bounds)}{inside}"
    summands = " and ".join(str(at + 1) for at in strategy.partial)
    return f"{text}, operand {summands} a summand" if summands else text


def placement_text(placement: Placement) -> str:
    """Where a value lives."""
    if placement.cut is None:
        return "Partial: a summand on every rank" if placement.partial else "Replicate: the whole on every rank"
    cut = placement.cut
    of = f"dim {cut.dim}" if cut.outer == 1 else f"each of the {cut.outer} parts of dim {cut.dim}"
    said = f"Shard({cut.dim}): of {of} rank by rank {bounds_text(cut.bounds)}"
    if not disjoint(cut.bounds):
        said += ", copies where they overlap"
    return f"{said}, each a summand" if placement.partial else said


def bounds_text(bounds: Bounds) -> str:
    shown = [f"{lo}:{hi}" for lo, hi in bounds]
    if len(shown) > RANKS_SHOWN:
        shown = [*shown[: RANKS_SHOWN - 1], "...", shown[-1]]
    return " ".join(shown)


def _dims(spec: Spec, dims: Dims) -> str:
    return " ".join(_dim(spec, axes) for axes in dims) or "()"


def _dim(spec: Spec, axes: tuple[Axis, ...]) -> str:
    texts = [_axis(spec, axis) for axis in axes]
    return "1" if not texts else texts[0] if len(texts) == 1 else f"({' '.join(texts)})"


def _axis(spec: Spec, axis: Axis) -> str:
    letter = factor(spec, axis.factor)
    if axis.group > 1:
        return f"{letter}/{axis.group}"
    if axis.reach:
        return f"{letter}*{axis.stride}+{axis.reach}"
    return letter if axis.size is None else f"{letter}[{axis.offset}:{axis.offset + axis.size}]"
