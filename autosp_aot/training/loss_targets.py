"""What a loss takes as labels, computed from a batch alone by lines of whole.program.

    %shifted = slice(%labels, 1, 1, ...)            a shift and a reshape mostly
    %target = reshape(%shifted, ...)
    nll_loss_forward(%scores, %target, ..., -100)

So labels are seen where the loss reads them, however the model shifts them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from autosp_aot.artifact.manifest import BUFFERS, Manifest
from autosp_aot.artifact.read import read_tensors, read_whole
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Instr, Program, Ref, Section
from autosp_aot.proof.reach import Reach, reaches
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.module import run
from autosp_aot.runtime.operators import check_operators

HOST = Group(0, 1, torch.device("cpu"))
CROSS_ENTROPY = "aten.nll_loss_forward.default"
# Operators that pick a score by label, and which argument the labels are.
# What stands for the tokens of a row in a probe: numbers that are no class, and no mark for what does not count.
FIRST = 10**8
CROSS_ENTROPIES = (CROSS_ENTROPY, "aten.nll_loss2d_forward.default")
LABELS_OF = dict.fromkeys(CROSS_ENTROPIES, 1) | {"aten.gather.default": 2}


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
    whole, constants = read_whole(path, manifest), read_tensors(path, manifest, BUFFERS)
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


def check_targets(path: Path, manifest: Manifest, batches: Iterable[Mapping[str, Tensor]], file: Path) -> None:
    """Raise ArtifactError (`target-out-of-range`) unless every target of a cross entropy is a class or is ignored.

    Targets that follow from more than the batch and stored values are left to the step.
    """
    values = read_whole(path, manifest).values()
    crosses = [found for found in open_targets(path, manifest) if found.instr.op in CROSS_ENTROPIES]
    for batch in batches:
        for found in (found for found in crosses if found.reads <= {*batch, *found.constants}):
            classes, ignored = values[found.instr.args[0].name].sizes[:2][-1], found.instr.args[4]
            targets = found.of(dict(batch))
            wrong = targets[(targets != ignored) & ((targets < 0) | (targets >= classes))]
            if wrong.numel():
                scored = f"has scores for 0 to {classes - 1} and passes over {ignored}"
                raise ArtifactError(Problem(
                    "target-out-of-range", f"{wrong.numel()} targets are no class, {wrong[0].item()} among them",
                    str(file), f"the loss ({found.instr.where.source}) {scored}",
                    "give targets among these, or build the model with the ignore_index of the file",
                ))  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """What an instruction of the loss compares at a position: scores, and the token that they are to name."""

    instr: Instr
    scores: Reach
    targets: Reach

    @property
    def place(self) -> str:
        return self.instr.where.source

    @property
    def is_known(self) -> bool:
        """Whether it is known after which token, of those that the scores of a position follow from, its target is."""
        alike = (self.targets.outer, self.targets.extent) == (self.scores.outer, self.scores.extent)
        return self.scores.known and alike and self.targets.dim is not None and self.targets.low == self.targets.high

    @property
    def ahead(self) -> float:
        """How many tokens after the last one that the scores follow from the target is, where that is known."""
        return self.targets.high - self.scores.high


def shifted_inputs(path: Path, manifest: Manifest) -> frozenset[str]:
    """The inputs to give the next tokens where all inputs are windows of one text: the targets of a causal model that
    compares position with position. Empty where the model shifts its targets itself.

    Raises ArtifactError where one text cannot serve as inputs and targets: `targets-not-causal`, `targets-not-shifted`,
    `targets-several`, `targets-unknown`.
    """
    tokens = {spec.name: 1 for spec in manifest.batch if spec.dtype in ("i64", "i32") and len(spec.shape) == 2}
    found = _compared(read_whole(path, manifest), tokens)
    if not found:
        if len(tokens) > 1:
            raise _refused("targets-unknown", [""])
        return frozenset()
    mixed = [one for one in found if one.scores.ahead]
    if mixed:
        raise _refused("targets-not-causal", [one.place for one in mixed], mixed[0].scores.ahead)
    if not all(one.is_known for one in found):
        _refuse_asked(path, manifest, list(tokens), found)
        return frozenset()
    if len({one.ahead for one in found}) > 1:
        raise _refused("targets-several", [one.place for one in found])
    if found[0].ahead >= 1:
        return frozenset()
    scored, named = (frozenset().union(*(reach.inputs for reach in part))
                     for part in ([one.scores for one in found], [one.targets for one in found]))  # fmt: skip
    if found[0].ahead < 0 or scored & named:
        raise _refused("targets-not-shifted", [one.place for one in found])
    return named


def _refuse_asked(path: Path, manifest: Manifest, tokens: list[str], found: list[Compared]) -> None:
    """Refuse a loss that asks for the first token of a row, which nothing comes before, or of which that is unknown.

    Which tokens are asked for is tried on a batch; a model that asks for none of the first shifts its targets.
    """
    given = {spec.name for spec in (*manifest.batch, *manifest.buffers)}
    probe = {spec.name: torch.ones(spec.shape, dtype=DTYPES[spec.dtype]) for spec in manifest.batch}
    for name in tokens:
        rows, length = probe[name].shape
        probe[name] = torch.arange(FIRST, FIRST + length, dtype=probe[name].dtype).expand(rows, length)
    for targets in open_targets(path, manifest):
        if not targets.reads & set(tokens):
            continue
        asked = set(targets.of(probe).flatten().tolist()) if targets.reads <= given else set()
        if FIRST in asked:
            raise _refused("targets-not-shifted", [targets.instr.where.source])
        if not any(token > FIRST for token in asked):
            raise _refused("targets-unknown", [targets.instr.where.source])


def _compared(whole: Program, tokens: Mapping[str, int]) -> list[Compared]:
    """Of each instruction that picks a score by label, where the label follows from tokens."""
    instrs, values = list(whole.instrs()), whole.values()
    picks = [instr for instr in instrs if instr.op in LABELS_OF and isinstance(instr.args[LABELS_OF[instr.op]], Ref)]
    needed = {name for instr in picks for name in instr.refs()}
    lines = []
    for instr in reversed(instrs):
        if any(out.name in needed for out in instr.values()):
            needed |= set(instr.refs())
            lines.append(instr)
    found = reaches(lines[::-1], values, tokens)
    nothing = Reach(None, 1, 1, -inf, inf, frozenset())
    pairs = ((instr, instr.args[0].name, instr.args[LABELS_OF[instr.op]].name) for instr in picks)
    compared = [
        Compared(instr, found.get(scores, nothing), found[labels])
        for instr, scores, labels in pairs if labels in found
    ]  # fmt: skip
    return compared


WHAT = {
    "targets-not-causal": "the scores of a position follow from the tokens after it",
    "targets-not-shifted": "the loss asks at a position for the very token of that position",
    "targets-several": "the loss asks at a position for several tokens",
    "targets-unknown": "which token the loss asks for at a position cannot be told",
}


def _refused(code: str, places: list[str], ahead: str = "") -> ArtifactError:
    why = "data fills every input with the same tokens: a model that does not shift its targets learns to copy them"
    if code == "targets-not-causal":
        why = f"data fills every input with the same tokens, and with {ahead} the model reads what it is to name"
    if code == "targets-several":
        why = "data fills every input with the same tokens, or gives the targets the next ones"
    fix = "give inputs and targets with --batch-file"
    if code in ("targets-not-shifted", "targets-unknown"):
        shift = "cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
        fix = f"shift in forward, as in {shift}; or {fix}"
    return ArtifactError(*(Problem(code, WHAT[code], place, why, fix) for place in dict.fromkeys(places)))
