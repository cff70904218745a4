"""Whether all ranks are about to run the same, asked once, before they meet in anything else.

    each rank  ->  what it runs, as texts by name, under its number in the store
    rank 0     ->  the verdict: which of them differ, on which ranks
    each rank  <-  the verdict: all go on, or all end with the same error

The store is what process groups are made with, so nothing is up yet that would have to be torn down, on any node.
"""

import json
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from autosp_aot.errors import ArtifactError, Problem

PREFIX, REFUSED, NOTHING = "autosp-aot", "refused", "nothing"
# How long ranks may start after each other; what they do before (proofs, looking at data) takes a part of that.
START_LIMIT_S, READ_LIMIT_S = 600.0, 30.0
LISTED = 4

Facts = Mapping[str, str]


def agree(store: dist.Store, rank: int, size: int, facts: Facts, limit_s: float = START_LIMIT_S) -> None:
    """Raise ArtifactError on all ranks alike: `ranks-differ` where facts do, `ranks-missing` where ranks do not come.

    `facts` say what a rank runs; a name that only some ranks have differs as well. A rank that cannot run says why
    under REFUSED, and nothing else is compared.
    """
    store = dist.PrefixStore(PREFIX, store)
    store.set(f"facts {rank}", json.dumps(dict(facts)))
    if rank == 0:
        store.set("verdict", json.dumps(_verdict(store, size, limit_s)))
    store.wait(["verdict"], timedelta(seconds=limit_s + 60))
    problems = json.loads(store.get("verdict"))
    store.add("read", 1)
    ended = time.monotonic() + READ_LIMIT_S
    while rank == 0 and store.add("read", 0) < size - len(problems["missing"]) and time.monotonic() < ended:
        time.sleep(0.01)  # it may be the one that holds the store
    if problems["missing"]:
        raise _missing(problems["missing"], size, limit_s)
    if problems["differ"]:
        raise _differ(problems["differ"])


def refuse_differences(said: list[dict[str, str]]) -> None:
    """Raise ArtifactError (`ranks-differ`) unless all ranks say the same; `said[r]` is what rank r says."""
    differ = differences(said)
    if differ:
        raise _differ(differ)


def _verdict(store: dist.Store, size: int, limit_s: float) -> dict:
    """The ranks that are missing; what differs, by its name: (text, the ranks that say so)."""
    try:
        store.wait([f"facts {rank}" for rank in range(size)], timedelta(seconds=limit_s))
    except dist.DistStoreError:
        return {"missing": [rank for rank in range(size) if not store.check([f"facts {rank}"])], "differ": {}}
    said = [json.loads(store.get(f"facts {rank}")) for rank in range(size)]
    return {"missing": [], "differ": differences(said)}


def differences(said: list[dict[str, str]]) -> dict[str, list[tuple[str, list[int]]]]:
    """What not all ranks say alike, by its name: each text with the ranks that say it. `said[r]` is of rank r."""
    names = dict.fromkeys(name for facts in said for name in facts)
    names = {REFUSED: None} if REFUSED in names else names
    found = {}
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(said):
            ranks.setdefault(facts.get(name, NOTHING), []).append(rank)
        if len(ranks) > 1:
            found[name] = list(ranks.items())
    return found


def _differ(differ: dict[str, list]) -> ArtifactError:
    if REFUSED in differ:
        reasons = [f"{_ranks(ranks)}: {text}" for text, ranks in differ[REFUSED] if text != NOTHING]
        return ArtifactError(Problem("ranks-differ", "not all ranks can start", why="\n".join(reasons),
                                     fix="see what they say themselves"))  # fmt: skip
    lines = [
        f"{name}: " + "; ".join(f"{text} on {_ranks(ranks)}" for text, ranks in said) for name, said in differ.items()
    ]
    return ArtifactError(Problem(
        "ranks-differ", f"the ranks do not run the same: {', '.join(differ)}", why="\n".join(lines),
        fix="start all nodes with the same artifact, packages, data and options",
    ))  # fmt: skip


def _missing(ranks: list[int], size: int, limit_s: float) -> ArtifactError:
    return ArtifactError(Problem(
        "ranks-missing", f"{_ranks(ranks)} of {size} did not start within {limit_s:g} s",
        fix="look for what they said; start all nodes with the same number of processes in all",
    ))  # fmt: skip


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:LISTED])) + (f" and {len(ranks) - LISTED} more" if len(ranks) > LISTED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
