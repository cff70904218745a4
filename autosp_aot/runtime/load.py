"""From an artifact to a module, strictly: hashes, schema, parse, verify, operators, weights, and only then memory."""

from pathlib import Path

import torch
from torch import nn

from autosp_aot.artifact import BUFFERS, Manifest
from autosp_aot.artifact_read import read_manifest, read_rank, read_tensors
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.operators import STRUCTURE, schema
from autosp_aot.program import Program
from autosp_aot.runtime.checkpoint import read_weights
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.groups import Group
from autosp_aot.runtime.module import Comm, ShardedModel
from autosp_aot.scores import check


def load(
    path: str | Path,
    init_from: str | Path | None = None,
    device: torch.device | str | None = None,
    comm: Comm | None = None,
) -> nn.Module:
    """A module for this rank: forward returns the loss, backward fills `.grad`, parameters have the original's names.

    Rank and ranks come from `comm`, by default the torchrun environment (or the process group that is there already).
    `init_from` is a safetensors file or a folder of them, used instead of the stored weights. Raises ArtifactError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if comm is None:
        group = Group.join(manifest.target)
        comm, device = group, device or group.device
    check_size(path, manifest, comm.size)
    device = torch.device(device or "cpu")
    if (device.type == "cpu") != (manifest.target == "cpu"):
        what = f"the artifact is for {manifest.target}, the device is {device.type}"
        why, fix = "kernels are fixed when an artifact is built", f"build with --target for {device.type}"
        raise ArtifactError(Problem("wrong-device", what, str(path), why, fix))
    program = read_rank(path, comm.rank)
    check_operators(program, manifest)
    weights = read_weights(path, manifest, None if init_from is None else Path(init_from))
    return ShardedModel(manifest, Executor(program, comm.rank, device), weights, read_tensors(path, BUFFERS), comm)


def check_size(path: Path, manifest: Manifest, size: int) -> None:
    """Raise ArtifactError (`world-size`) unless there are as many ranks as the artifact has programs."""
    if size != manifest.ranks:
        what = f"the artifact is for {manifest.ranks} ranks, and here are {size}"
        fix = f"start {manifest.ranks} processes, or build for {size}"
        raise ArtifactError(Problem("world-size", what, str(path), "each rank runs its own program", fix))


def check_operators(program: Program, manifest: Manifest) -> None:
    """Raise ArtifactError unless every operator is allowed and is, in this torch, what it was at the build."""
    problems = []
    for op in sorted({instr.op for instr in program.instrs()} - set(STRUCTURE)):
        here = schema(op)
        if here is None:
            problems.append(Problem("operator-refused", f"{op} is not allowed in a program",
                                    why="it is not a pure operator of ATen",
                                    fix="build the artifact again"))  # fmt: skip
        elif here != manifest.operators.get(op):
            problems.append(Problem("operator-changed", f"{op} is not what it was when the artifact was built",
                                    why=f"then {manifest.operators.get(op)}\nnow  {here}",
                                    fix=f"use torch {manifest.versions['torch']}, or build again"))  # fmt: skip
    for instr in program.instrs():
        score = dict(instr.kwargs).get("score")
        try:
            check(score, sum(len(arg) for arg in instr.args if isinstance(arg, tuple)) if score is not None else 0)
        except ValueError as error:
            problems.append(Problem("operator-refused", f"{instr.op} is given a score that is not allowed",
                                    instr.where.source, str(error), "build the artifact again"))  # fmt: skip
    if problems:
        raise ArtifactError(*problems)
