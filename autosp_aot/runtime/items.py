"""How many labels count: what a model divides the sum of its losses by that takes `num_items_in_batch`.

    %target = ...%labels...                         lines of whole.program, a shift and a reshape mostly
    nll_loss_forward(%scores, %target, ..., -100)   what is not -100 counts
    div(%nll_loss, %num_items_in_batch)

The lines that lead from the batch to the target are run on each batch, so labels count where the loss reads them: as
transformers' Trainer counts `labels[..., 1:]` for a loss that shifts.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from autosp_aot.artifact import BUFFERS, Manifest, TensorSpec
from autosp_aot.artifact_read import read_tensors, read_whole
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.program import Instr, Program, Section
from autosp_aot.runtime.execute import DTYPES, Executor
from autosp_aot.runtime.groups import Group
from autosp_aot.runtime.load import check_operators
from autosp_aot.runtime.module import run

ITEMS = "num_items_in_batch"
HOST = Group(0, 1, torch.device("cpu"))


def is_items(entry: TensorSpec) -> bool:
    """Whether an input is the number of labels that count in a step: an integer scalar of transformers' name."""
    return entry.name == ITEMS and entry.shape == () and not DTYPES[entry.dtype].is_floating_point


@dataclass(frozen=True)
class Items:
    """Counts labels. `executor` gives the targets of a batch, `ignored` is the one that does not count."""

    executor: Executor
    constants: dict[str, Tensor]
    ignored: int
    dtype: torch.dtype

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels of a batch, on the host, that count: i64, a scalar."""
        found = run(self.executor, "targets", self.constants | batch, HOST)
        return (found["targets"] != self.ignored).sum()

    def filled(self, batch: dict[str, Tensor], count: Tensor) -> dict[str, Tensor]:
        """The batch, with what all batches of the step counted together."""
        return batch | {ITEMS: count.to("cpu", self.dtype)}


def open_items(path: Path, manifest: Manifest) -> Items | None:
    """What counts labels for an artifact; None where its model does not take `num_items_in_batch`.

    Raises ArtifactError `items-unknown` where the labels that count cannot be told from the program.
    """
    entry = next((entry for entry in manifest.batch if is_items(entry)), None)
    if entry is None:
        return None
    whole = read_whole(path)
    targets = {(i.refs()[1], i.args[4]) for i in whole.instrs() if i.op == "aten.nll_loss_forward.default"}
    if len(targets) != 1:
        raise _unknown(path, f"it has {len(targets)} cross entropies whose labels differ; it should have one")
    (name, ignored), = targets
    lines = _lines_to(name, whole)
    given = {spec.name for spec in (*manifest.batch, *manifest.buffers)} - {ITEMS}
    others = sorted({ref for i in lines for ref in i.refs()} - {out.name for i in lines for out in i.values()} - given)
    if others:
        raise _unknown(path, f"the targets of its cross entropy are computed from {', '.join(others)}")
    program = replace(whole, sections=(Section("targets", (), tuple(lines), (("targets", name),)),))
    check_operators(program, manifest)
    return Items(Executor(program, 0, HOST.device), read_tensors(path, BUFFERS), ignored, DTYPES[entry.dtype])


def _lines_to(name: str, whole: Program) -> list[Instr]:
    """The instructions that a value of the whole program follows from, in order."""
    needed, lines = {name}, []
    for instr in reversed(list(whole.instrs())):
        if any(out.name in needed for out in instr.values()):
            needed |= set(instr.refs())
            lines.append(instr)
    return lines[::-1]


def _unknown(path: Path, why: str) -> ArtifactError:
    return ArtifactError(Problem(
        "items-unknown", "which labels count in a step cannot be told", str(path), why,
        f"train with a loop of your own that gives {ITEMS}, or build a model that counts for itself",
    ))  # fmt: skip
