"""What a loss takes as labels, computed from a batch alone by lines of whole.program.

    %shifted = slice(%labels, 1, 1, ...)            a shift and a reshape mostly
    %target = reshape(%shifted, ...)
    nll_loss_forward(%scores, %target, ..., -100)

So labels are seen where the loss reads them, however the model shifts them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from autosp_aot.artifact.manifest import BUFFERS, Manifest
from autosp_aot.artifact.read import read_tensors, read_whole
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.program import Instr, Ref, Section
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.execute import DTYPES, Executor
from autosp_aot.runtime.load import check_operators
from autosp_aot.runtime.module import run

HOST = Group(0, 1, torch.device("cpu"))
CROSS_ENTROPY = "aten.nll_loss_forward.default"
# Operators that pick a score by label, and which argument the labels are.
LABELS_OF = {CROSS_ENTROPY: 1, "aten.nll_loss2d_forward.default": 1, "aten.gather.default": 2}
# What stands for the tokens of a row in a probe: numbers that are no class, and no mark for what does not count.
FIRST = 10**8


@dataclass(frozen=True)
class Targets:
    """The labels of one instruction of the whole step. `reads` are the inputs of the step that they follow from."""

    instr: Instr
    reads: frozenset[str]
    executor: Executor
    constants: dict[str, Tensor]

    def of(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels of a batch, on the host."""
        return run(self.executor, "targets", self.constants | batch, HOST)["targets"]


def open_targets(path: Path, manifest: Manifest) -> list[Targets]:
    """The labels that an artifact's loss takes, each once."""
    whole, constants = read_whole(path), read_tensors(path, BUFFERS)
    inputs = {entry.value.name for entry in whole.inputs}
    found: dict[tuple, Targets] = {}
    for instr in whole.instrs():
        name = instr.args[LABELS_OF[instr.op]] if instr.op in LABELS_OF else None
        if not isinstance(name, Ref):
            continue
        needed = {name.name}
        lines: list[Instr] = []
        for line in reversed(list(whole.instrs())):
            if any(out.name in needed for out in line.values()):
                needed |= set(line.refs())
                lines.insert(0, line)
        program = replace(whole, sections=(Section("targets", (), tuple(lines), (("targets", name.name),)),))
        check_operators(program, manifest)
        executor = Executor(program, 0, HOST.device)
        key = instr.op, name, instr.args[-1]
        found.setdefault(key, Targets(instr, frozenset(needed & inputs), executor, constants))
    return list(found.values())


def refuse_unshifted(path: Path, manifest: Manifest) -> None:
    """Raise ArtifactError where a model that is given the same tokens as inputs and as labels might learn to copy them.

    A model that shifts its labels never asks for the first of a row, which nothing comes before. `targets-not-shifted`
    where it does, `targets-unknown` where that cannot be told.
    """
    given = {spec.name for spec in (*manifest.batch, *manifest.buffers)}
    tokens = [spec for spec in manifest.batch if spec.dtype in ("i64", "i32") and len(spec.shape) == 2]
    probe = {spec.name: torch.ones(spec.shape, dtype=DTYPES[spec.dtype]) for spec in manifest.batch}
    for spec in tokens:
        probe[spec.name] = torch.arange(FIRST, FIRST + spec.shape[1], dtype=DTYPES[spec.dtype]).expand(spec.shape)
    problems, labels = [], [found for found in open_targets(path, manifest) if found.reads & {t.name for t in tokens}]
    for found in labels:
        asked = set(found.of(probe).flatten().tolist()) if found.reads <= given else set()
        if FIRST in asked:
            problems.append(_problem("targets-not-shifted", found.instr.where.source))
        elif not any(token > FIRST for token in asked):
            problems.append(_problem("targets-unknown", found.instr.where.source))
    if len(tokens) > 1 and not labels:
        problems.append(_problem("targets-unknown", ""))
    if problems:
        raise ArtifactError(*dict.fromkeys(problems))


def _problem(code: str, place: str) -> Problem:
    what = {"targets-not-shifted": "the loss asks at a position for the very token of that position",
            "targets-unknown": "which token the loss asks for at a position cannot be told"}  # fmt: skip
    return Problem(
        code, what[code], place,
        "data fills every input with the same tokens: a model that does not shift its targets learns to copy them",
        "shift in forward, as in cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()); or give inputs "
        "and targets with --batch-file",
    )  # fmt: skip
