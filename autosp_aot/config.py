"""Every option of a build."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildConfig:
    """What a build is told; the default is what most people want.

    ranks       how many ranks share a sequence
    target      the device the program is for: cpu, cuda or rocm
    recompute   what is computed again in backward: `none`; `sac`, all but attention and collectives; `full`, attention
                too; `auto`, what the budget needs. The numbers are the same
    memory_budget_bytes
                what parameters, gradients, activations and workspace of a rank may take together
    tile        how many slices of the sequence loss and MLP are computed in: a number, `auto` (by size) or `off`
    offload     which kept values wait in host memory: `off`, `host` (all), `auto` (what the budget needs)
    strict      refuse operators without a rule instead of computing them on every rank
    """

    ranks: int
    target: str = "cpu"
    recompute: str = "sac"
    strict: bool = False
    memory_budget_bytes: int | None = None
    tile: str | int = "auto"
    offload: str = "off"
