"""Every option of a build."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildConfig:
    """What a build is told; the default is what most people want.

    ranks       how many ranks share a sequence
    target      the device the program is for: cpu, cuda or rocm
    recompute   `sac` computes all but attention again in backward, `none` keeps everything: the numbers are the same
    strict      refuse operators without a rule instead of computing them on every rank
    """

    ranks: int
    target: str = "cpu"
    recompute: str = "sac"
    strict: bool = False
