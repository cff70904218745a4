"""From an artifact to a module, strictly: hashes, schema, parse, verify, operators, weights, and only then memory."""

from pathlib import Path

import torch

from autosp_aot.artifact.manifest import BUFFERS, EVALUATE, STEP, Manifest
from autosp_aot.artifact.read import read_manifest, read_rank, read_tensors
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.program import Program
from autosp_aot.ir.score_expr import check
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ops.table import schema
from autosp_aot.runtime.comm import Mesh, check_size
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.module import Comm, ShardedModel
from autosp_aot.runtime.weights_in import read_weights
from autosp_aot.targets.table import TARGETS


def load(
    path: str | Path,
    init_from: str | Path | None = None,
    device: torch.device | str | None = None,
    comm: Comm | None = None,
    sum_gradients: bool = True,
) -> ShardedModel:
    """A module for this rank: forward returns the loss, backward fills `.grad`, parameters have the original's names.

    Rank and ranks come from `comm`, by default the torchrun environment (or the process group that is there already).
    Without `sum_gradients` what backward leaves in `.grad` are partial sums, to be added up over the ranks.
    `init_from` is a safetensors file or a folder of them, as save_pretrained or `--save` writes it, used instead of the
    stored weights. Raises ArtifactError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if comm is None:
        group = Mesh.join(manifest.target, manifest.ranks, dp=1).sequence
        comm, device = group, device or group.device
    check_size(comm.size, manifest.ranks, dp=1)
    device = torch.device(device or "cpu")
    if device.type != TARGETS[manifest.target].device_type:
        what = f"the artifact is for {manifest.target}, the device is {device.type}"
        why, fix = "kernels are fixed when an artifact is built", f"build with --target for {device.type}"
        raise ArtifactError(Problem("wrong-device", what, str(path), why, fix))
    programs = {kind: read_rank(path, comm.rank, kind) for kind in manifest.programs}
    for program in programs.values():
        check_operators(program, manifest)
    weights = read_weights(path, manifest, None if init_from is None else Path(init_from), device)
    executor, buffers = Executor(programs[STEP], comm.rank, device), read_tensors(path, BUFFERS)
    return ShardedModel(path, manifest, executor, weights, buffers, comm, sum_gradients, programs.get(EVALUATE))


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
