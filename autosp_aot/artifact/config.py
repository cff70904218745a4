"""Every option of a build."""

from dataclasses import dataclass

from autosp_aot.errors import BuildError, Problem
from autosp_aot.targets.devices import DEVICES, Device
from autosp_aot.targets.table import TARGETS

RECOMPUTE = ("auto", "sac", "full", "none")
OFFLOAD = ("off", "auto", "host")


@dataclass(frozen=True)
class BuildConfig:
    """Build options; the default is what most people want.

    ranks       how many ranks share a sequence
    target      the device the program is for: cpu, cuda or rocm
    recompute   what is recomputed in backward: `none`; `sac`, all but attention and collectives; `full`, attention
                too; `auto`, what the budget needs. The numbers are the same
    memory_budget_bytes
                what parameters, gradients, activations and workspace of a rank may take together
    tile        how many slices of the sequence loss and MLP are computed in: a number, `auto` (by size) or `off`
    offload     which saved values wait in host memory: `off`, `host` (all), `auto` (what the budget needs)
    device      at whose rates a budget's choices are priced; None, the first of `targets.DEVICES` of the target's kind
    strict      refuse operators without a rule instead of computing them on every rank
    evaluation  build the program that gives the loss in eval mode as well
    """

    ranks: int
    target: str = "cpu"
    recompute: str = "sac"
    strict: bool = False
    memory_budget_bytes: int | None = None
    tile: str | int = "auto"
    offload: str = "off"
    device: Device | None = None
    evaluation: bool = True

    @property
    def budget_bytes(self) -> int:
        """The memory budget of a build that has one."""
        assert self.memory_budget_bytes is not None
        return self.memory_budget_bytes


def checked_config(
    ranks: int,
    target: str,
    recompute: str | None = None,
    memory_budget_bytes: int | None = None,
    tile: str | int = "auto",
    offload: str = "off",
    strict: bool = False,
    evaluation: bool = True,
) -> BuildConfig:
    """The options as people give them: `target` a kind (cuda) or a device (h100), recompute None `auto` with a budget
    and `sac` without.

    Raises BuildError: `no-such-choice`, `budget-missing` for an auto with nothing to choose by, and `budget-unused` for
    a budget that nothing would be chosen by.
    """
    _one_of("sp", ranks, isinstance(ranks, int) and ranks >= 1, ("a number of ranks",))
    _one_of("target", target, target in (*TARGETS, *DEVICES), (*TARGETS, *DEVICES))
    device = None if target in TARGETS else DEVICES[target]
    recompute = recompute or ("sac" if memory_budget_bytes is None else "auto")
    _one_of("recompute", recompute, recompute in RECOMPUTE, RECOMPUTE)
    _one_of("offload", offload, offload in OFFLOAD, OFFLOAD)
    number = isinstance(tile, int) and not isinstance(tile, bool) and tile >= 1
    _one_of("tile", tile, number or tile in ("auto", "off"), ("auto", "off", "a number of slices"))
    said = f"recompute {recompute} and offload {offload}"
    if "auto" in (recompute, offload) and memory_budget_bytes is None:
        raise BuildError(Problem(
            "budget-missing", f"{said}, without a memory budget", why="auto does what a budget needs, and no more",
            fix="give --memory-budget (memory_budget=), or say what to do",
        ))  # fmt: skip
    if "auto" not in (recompute, offload) and memory_budget_bytes is not None:
        raise BuildError(Problem(
            "budget-unused", f"{said}, with a memory budget", why="with both of them said, nothing is left to choose",
            fix="leave one of them auto, or leave the budget out: autosp-aot plan says whether it fits",
        ))  # fmt: skip
    if memory_budget_bytes is not None:
        memory_budget_bytes = int(memory_budget_bytes)  # 70e9 is a number of bytes too
    kind = target if device is None else device.kind
    return BuildConfig(ranks, kind, recompute, strict, memory_budget_bytes, tile, offload, device, evaluation)


def _one_of(name: str, given: object, known: bool, choices: tuple[str, ...]) -> None:
    if not known:
        what = f"{name} is {given!r}"
        raise BuildError(Problem("no-such-choice", what, fix=f"give one of {', '.join(choices)}"))
