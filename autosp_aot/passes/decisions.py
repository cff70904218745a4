"""The strategy that each call of a step was given, as text of a manifest, and read again.

    cuts       {"cut0": "0:3 3:5"}                    intervals of all ranks, each once
    decisions  {"h": "cut factor 1 at cut0",          by the name of a call's first result; a call that is not there
                "g": "whole, summands 0 1"}           computes the whole on every rank
"""

import re
from collections.abc import Mapping

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.placement import Bounds
from autosp_aot.sharding.spec import Strategy

_DECISION = re.compile(r"(?:whole|cut factor (\d+) at (\w+)(?: inside (\d+))?)(?:, summands (\d+(?: \d+)*))?")
_CUT = re.compile(r"\d+:\d+(?: \d+:\d+)*")


def written(decisions: Mapping[str, Strategy]) -> tuple[dict[str, str], dict[str, str]]:
    """Cuts and decisions as text; the same strategies give the same text."""
    names: dict[Bounds, str] = {}
    texts = {}
    for value, strategy in decisions.items():
        text = "whole"
        if strategy.factor is not None:
            name = names.setdefault(strategy.bounds, f"cut{len(names)}")
            inside = f" inside {strategy.outer}" if strategy.outer != 1 else ""
            text = f"cut factor {strategy.factor} at {name}{inside}"
        summands = f", summands {' '.join(map(str, strategy.partial))}" if strategy.partial else ""
        texts[value] = text + summands
    return {name: " ".join(f"{lo}:{hi}" for lo, hi in bounds) for bounds, name in names.items()}, texts


def read(cuts: Mapping[str, str], decisions: Mapping[str, str]) -> dict[str, Strategy]:
    """The strategies of `written`. Raises ArtifactError (`decision-wrong`) for what it would not have written."""
    bounds = {name: _bounds(name, text) for name, text in cuts.items()}
    return {value: _strategy(value, text, bounds) for value, text in decisions.items()}


def _bounds(name: str, text: str) -> Bounds:
    if not _CUT.fullmatch(text):
        raise decision_wrong(name, f"{text!r} is no list of intervals")
    return tuple((int(lo), int(hi)) for lo, hi in (box.split(":") for box in text.split(" ")))


def _strategy(value: str, text: str, bounds: Mapping[str, Bounds]) -> Strategy:
    match = _DECISION.fullmatch(text)
    if not match or (match[2] and match[2] not in bounds):
        raise decision_wrong(value, f"{text!r} is no decision that a build writes")
    summands = tuple(map(int, (match[4] or "").split()))
    if match[1] is None:
        return Strategy(partial=summands)
    return Strategy(int(match[1]), bounds[match[2]], summands, int(match[3] or 1))


def decision_wrong(value: str, why: str) -> ArtifactError:
    """The error for a recorded decision that cannot be taken again."""
    what = f"the recorded decision of {value} cannot be taken again"
    return ArtifactError(Problem("decision-wrong", what, why=why, fix="build the artifact again"))
