"""From an artifact to a module, strictly: hashes, schema, parse, verify, operators, weights, and only then memory."""

import contextlib
from pathlib import Path

import torch

from autosp_aot.artifact.manifest import BUFFERS, EVALUATE, STEP
from autosp_aot.artifact.read import read_manifest, read_rank, read_tensors
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.runtime.comm import Mesh, check_size
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.module import Comm, ShardedModel
from autosp_aot.runtime.operators import check_operators
from autosp_aot.runtime.proved import require_digest, require_proof
from autosp_aot.runtime.weights_in import read_weights
from autosp_aot.targets.table import TARGETS


def load(
    path: str | Path,
    init_from: str | Path | None = None,
    device: torch.device | str | None = None,
    comm: Comm | None = None,
    sum_gradients: bool = True,
    digest: str | None = None,
) -> ShardedModel:
    """A module for this rank: forward returns the loss, backward fills `.grad`, parameters have the original's names.

    Rank and ranks come from `comm`, by default the torchrun environment (or the process group that is there already).
    Without `sum_gradients` what backward leaves in `.grad` are partial sums, to be added up over the ranks.
    `init_from` is a safetensors file or a folder of them, as save_pretrained or `--save` writes it, used instead of the
    stored weights. `digest` is what `autosp-aot check --digest` says of the artifact that is meant. One that was not
    proved before on this machine is proved first (`proved.py`). Raises ArtifactError.
    """
    path = Path(path)
    with Mesh.told() if comm is None else contextlib.nullcontext():
        manifest = read_manifest(path)
        digest = require_digest(path, digest)
        require_proof(path, manifest, digest)
    if comm is None:
        group = Mesh.join(manifest.target, manifest.ranks, dp=1, facts={"artifact": digest}).sequence
        comm, device = group, device or group.device
    check_size(comm.size, manifest.ranks, dp=1)
    device = torch.device(device or "cpu")
    if device.type != TARGETS[manifest.target].device_type:
        what = f"the artifact is for {manifest.target}, the device is {device.type}"
        why, fix = "kernels are fixed when an artifact is built", f"build with --target for {device.type}"
        raise ArtifactError(Problem("wrong-device", what, str(path), why, fix))
    programs = {kind: read_rank(path, manifest, comm.rank, kind) for kind in manifest.programs}
    for program in programs.values():
        check_operators(program, manifest)
    weights = read_weights(path, manifest, None if init_from is None else Path(init_from), device)
    executor, buffers = Executor(programs[STEP], comm.rank, device), read_tensors(path, manifest, BUFFERS)
    return ShardedModel(path, manifest, executor, weights, buffers, comm, sum_gradients, programs.get(EVALUATE))
