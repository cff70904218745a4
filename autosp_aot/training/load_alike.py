"""All ranks of a run load its artifact, with the same weights, or none goes on."""

from pathlib import Path

import torch

from autosp_aot.errors import ArtifactError, AutospError, Problem
from autosp_aot.runtime.comm import Mesh
from autosp_aot.runtime.load import load
from autosp_aot.runtime.module import ShardedModel
from autosp_aot.runtime.same_batch import check_same_weights


def load_alike(artifact: Path, init_from: str | Path | None, mesh: Mesh, digest: str | None) -> ShardedModel:
    """The module of this rank, which leaves partial sums of gradients.

    Raises ArtifactError: what `load` raises, `ranks-differ` where it raises on another rank, `weights-differ`.
    """
    module, failed = None, None
    try:
        module = load(artifact, init_from, mesh.world.device, mesh.sequence, sum_gradients=False, digest=digest)
    except AutospError as error:
        failed = error
    failures = int(mesh.world.sum(torch.tensor([failed is not None], dtype=torch.int64, device=mesh.world.device)))
    if failed is not None:
        raise failed
    if failures:
        why = f"{failures} of {mesh.world.size} cannot load the artifact or its weights"
        raise ArtifactError(Problem("ranks-differ", "not all ranks can start", why=why,
                                    fix="see what they say themselves"))  # fmt: skip
    assert module is not None, "nothing failed"
    check_same_weights(dict(module.named_parameters()), mesh.world)
    return module
