"""What ranks run is compared before they meet, and all of them end alike where it differs."""

import threading

import pytest
import torch.distributed as dist

from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.agreement import REFUSED, agree, differences


def verdicts(facts: dict[int, dict[str, str]], size: int, limit_s: float = 20) -> dict[int, str]:
    """What each rank that comes is told; "" where it may go on."""
    store, found = dist.HashStore(), {}

    def rank(number: int) -> None:
        try:
            agree(store, number, size, facts[number], limit_s)
            found[number] = ""
        except ArtifactError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_run_the_same_go_on():
    assert verdicts({rank: {"artifact": "a", "--lr": "1"} for rank in range(3)}, 3) == {0: "", 1: "", 2: ""}


@pytest.mark.parametrize("other", range(3))
def test_what_differs_is_named_on_all_ranks_with_the_ranks(other):
    facts = {rank: {"artifact": "a", "--lr": "1", "torch": "2"} for rank in range(3)}
    facts[other] |= {"artifact": "b", "--lr": "3"}
    told = verdicts(facts, 3)
    assert set(told) == {0, 1, 2} and len(set(told.values())) == 1
    assert told[0].startswith("error[ranks-differ]: the ranks do not run the same: artifact, --lr\n")
    assert f"b on rank {other}" in told[0] and "torch" not in told[0]


def test_the_message_whole():
    facts = {rank: {"artifact": "a"} for rank in range(7)}
    facts[3] = {}
    assert verdicts(facts, 7)[6] == (
        "error[ranks-differ]: the ranks do not run the same: artifact\n"
        "  why    artifact: a on ranks 0, 1, 2, 4 and 2 more; nothing on rank 3\n"
        "  fix    start all nodes with the same artifact, packages, data and options"
    )


def test_a_rank_that_cannot_run_is_all_that_is_said():
    assert differences([{"artifact": "a"}, {REFUSED: "error[no]: no"}]) == {
        REFUSED: [("nothing", [0]), ("error[no]: no", [1])]
    }


def test_who_does_not_come_is_named():
    assert verdicts({0: {}, 2: {}}, 4, limit_s=0.5)[2] == (
        "error[ranks-missing]: ranks 1, 3 of 4 did not start within 0.5 s\n"
        "  fix    look for what they said; start all nodes with the same number of processes in all"
    )
