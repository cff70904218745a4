"""All ranks in one process, in lockstep: every collective is done by handing buffers over.

Thousands of cases in seconds, where a process a rank takes seconds each. Programs and executor are the real ones.
"""

import torch
from torch import Tensor

from autosp_aot.ir.program import Program
from autosp_aot.ir.structure.record import Exchange, Meeting, Sum
from autosp_aot.runtime.execute import Executor, SectionRun


def simulate(
    programs: list[Program], inputs: dict[str, Tensor], grad_loss: Tensor, guess: Tensor | None = None,
    copying: bool = False,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """One step of all ranks: by rank, `loss` and `grad.<parameter>`.

    `programs[r]` is rank r's program; the whole step is a program of one rank. `inputs` are parameters, buffers, the
    batch and, where it draws, `seed` by name. What is computed before backward takes `guess` (default 1) for grad_loss.
    Programs that were not laid out for CPU are run with `copying` (see `Executor`).
    """
    guess = torch.ones_like(grad_loss) if guess is None else guess
    executors = [Executor(program, rank, torch.device("cpu"), copying=copying) for rank, program in enumerate(programs)]
    values = [inputs | {"grad_loss": grad_loss, "early.grad_loss": guess} for _ in executors]
    results: list[dict[str, Tensor]] = [{} for _ in executors]
    for section in programs[0].sections:
        found = lockstep([executor.run(section.name, mine) for executor, mine in zip(executors, values)])
        for result, given in zip(results, found):
            result.update(given)
    return results


def lockstep(runs: list[SectionRun]) -> list[dict[str, Tensor]]:
    """Advance all ranks from meeting to meeting; raises AssertionError where they do not meet alike."""
    answers: list[list[Tensor] | None] = [None] * len(runs)
    while True:
        meetings: list[Meeting] = []
        results = []
        for run, answer in zip(runs, answers):
            try:
                meetings.append(run.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if not meetings:
            return results
        exchanges = [meeting for meeting in meetings if isinstance(meeting, Exchange)]
        sums = [meeting for meeting in meetings if isinstance(meeting, Sum)]
        assert not results and not (exchanges and sums), "ranks do not meet in the same collective"
        found = _exchange(exchanges) if exchanges else _sum(sums)
        answers = [[answer] for answer in found]


def _exchange(meetings: list[Exchange]) -> list[Tensor]:
    parts = [meeting.buffer.split(meeting.send_sizes) for meeting in meetings]
    for rank, meeting in enumerate(meetings):
        assert meeting.receive_sizes == [len(sent[rank]) for sent in parts], "ranks disagree on sizes"
    return [torch.cat([sent[rank] for sent in parts]) for rank in range(len(meetings))]


def _sum(meetings: list[Sum]) -> list[Tensor]:
    total = meetings[0].buffer.clone()
    for meeting in meetings[1:]:
        total += meeting.buffer
    return [total.clone() for _ in meetings]
