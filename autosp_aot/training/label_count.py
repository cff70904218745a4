"""How many labels count: what a model divides the sum of its losses by that takes `num_items_in_batch`.

    %target = ...%labels...                         lines of whole.program (see loss_targets.py)
    nll_loss_forward(%scores, %target, ..., -100)   what is not -100 counts
    div(%nll_loss, %num_items_in_batch)

So labels count where the loss reads them: as transformers' Trainer counts `labels[..., 1:]` for a loss that shifts.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autosp_aot.artifact.manifest import Manifest, TensorSpec
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.training.loss_targets import CROSS_ENTROPY, Targets, open_targets

ITEMS = "num_items_in_batch"


def is_items(entry: TensorSpec) -> bool:
    """Whether an input is the number of labels that count in a step: an integer scalar of transformers' name."""
    return entry.name == ITEMS and entry.shape == () and not DTYPES[entry.dtype].is_floating_point


@dataclass(frozen=True)
class Items:
    """Counts labels: of `targets` all but those that are `ignored`."""

    targets: Targets
    ignored: int
    dtype: torch.dtype

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels of a batch, on the host, that count: i64, a scalar."""
        return (self.targets.of(batch) != self.ignored).sum()

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
    found = [targets for targets in open_targets(path, manifest) if targets.instr.op == CROSS_ENTROPY]
    if len(found) != 1:
        raise _unknown(path, f"it has {len(found)} cross entropies whose labels differ; it should have one")
    (targets,) = found
    others = targets.reads - {spec.name for spec in (*manifest.batch, *manifest.buffers) if spec.name != ITEMS}
    if others:
        raise _unknown(path, f"the targets of its cross entropy are computed from {', '.join(sorted(others))}")
    return Items(targets, targets.instr.args[4], DTYPES[entry.dtype])


def _unknown(path: Path, why: str) -> ArtifactError:
    return ArtifactError(Problem(
        "items-unknown", "which labels count in a step cannot be told", str(path), why,
        f"train with a loop of your own that gives {ITEMS}, or build a model that counts for itself",
    ))  # fmt: skip
