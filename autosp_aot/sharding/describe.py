"""Rules, strategies, placements and calls in words: factors as letters, upper case where a factor must be whole.

    aten.mm        a b, b c -> a c         a=26 b=32 c=48
    aten.reshape   a b C -> (a b) C        a dim of two factors
    attention      b may be seen as b/4    every four positions as one: query heads and their key/value head
    convolution    e may be seen as e*2+3  place e reads three places from 2e on
"""

from collections.abc import Mapping
from string import ascii_lowercase

from autosp_aot.ir.placement import Bounds, Placement, disjoint
from autosp_aot.ir.program import Arg, Dtype, Instr, PerRank, Ref, Value
from autosp_aot.sharding.spec import Axis, Dims, Spec, Strategy

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
    partial = " and ".join(str(at + 1) for at in strategy.partial)
    return f"{text}, operand {partial} a partial sum" if partial else text


def placement_text(placement: Placement, box: str = "rank") -> str:
    """Where a value lives; `box` is what has a box of it, a rank or a tile."""
    if placement.cut is None:
        return f"Partial: a partial sum on every {box}" if placement.partial else f"Replicate: the whole on every {box}"
    cut = placement.cut
    of = f"dim {cut.dim}" if cut.outer == 1 else f"each of the {cut.outer} parts of dim {cut.dim}"
    said = f"Shard({cut.dim}): of {of} {box} by {box} {bounds_text(cut.bounds)}"
    if not disjoint(cut.bounds):
        said += ", copies where they overlap"
    return f"{said}, each a partial sum" if placement.partial else said


def bounds_text(bounds: Bounds) -> str:
    shown = [f"{lo}:{hi}" for lo, hi in bounds]
    if len(shown) > RANKS_SHOWN:
        shown = [*shown[: RANKS_SHOWN - 1], "...", shown[-1]]
    return " ".join(shown)


def call_text(instr: Instr, values: Mapping[str, Value]) -> str:
    """The call with the placement of each operand."""
    args = [_argument(arg, values) for arg in instr.args]
    return f"{instr.op}({', '.join([*args, *(f'{k}={_argument(v, values)}' for k, v in instr.kwargs)])})"


def type_text(value: Value) -> str:
    """Dtype and a rank's shape, numbers that differ one after the other, and the whole shape."""
    shape = ", ".join(_argument(n, {}) for n in value.shape)
    return f"{value.dtype}[{shape}]" + (f", of {list(value.whole_shape)}" if value.placement.cut else "")


def _argument(arg: Arg, values: Mapping[str, Value]) -> str:
    if isinstance(arg, tuple):
        return f"[{', '.join(_argument(item, values) for item in arg)}]"
    if isinstance(arg, Ref):
        return f"{arg.name} @ {placement_text(values[arg.name].placement).partition(':')[0]}"
    if isinstance(arg, PerRank):
        return "/".join(map(str, arg.values))
    return arg.name if isinstance(arg, Dtype) else str(arg)


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
