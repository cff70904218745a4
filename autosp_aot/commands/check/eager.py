"""`autosp-aot check DIR --eager model.py`: an artifact against steps of the model that it was built from."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

from torch import nn

from autosp_aot.artifact.batches import constants_of, tensors_of
from autosp_aot.artifact.manifest import BUFFERS, EVALUATE, Manifest
from autosp_aot.artifact.read import read_manifest, read_rank, read_tensors, read_whole
from autosp_aot.commands.build.eager_check import Batch, differs
from autosp_aot.commands.check.numeric import refuse_large
from autosp_aot.commands.check.oracle import Built, EagerFailed, compare
from autosp_aot.commands.check.undrawn import NotComparable, draws
from autosp_aot.errors import ArtifactError, BuildError, Problem
from autosp_aot.export.example_batch import ask_batch
from autosp_aot.export.loss import forward_at
from autosp_aot.export.model_file import ModelFile, make_model, read_model_file
from autosp_aot.export.user_code import raised_at, said
from autosp_aot.ir.operators import DTYPES


def check_eager(
    path: str | Path, model_path: str | Path, options: Mapping[str, object], steps: int = 2, seed: int = 0
) -> list[str]:
    """Take steps of SGD with the model and with all ranks of the artifact; what was compared, a line each.

    The model is `build_model(**options)` with weights from `seed`, the batch its example_batch. Raises ArtifactError:
    `differs-from-eager`, `model-mismatch` where the artifact is of another model or batch, `numeric-too-large`,
    `eager-not-comparable`; and BuildError for a model that fails.
    """
    manifest = read_manifest(path)
    whole = read_whole(path, manifest)
    refuse_large(manifest, whole)
    model_file = read_model_file(model_path)
    model = make_model(model_file, options, seed, weights=True)
    _refuse_other(manifest, model, str(model_path))
    ranks = range(manifest.ranks)
    evaluation = [read_rank(path, manifest, rank, EVALUATE) for rank in ranks] if manifest.evaluation else None
    programs = [read_rank(path, manifest, rank) for rank in ranks]
    built = Built(whole, programs, evaluation, read_tensors(path, manifest, BUFFERS))
    try:
        outcome = compare(model, _batch(manifest, model_file), built, steps)
    except NotComparable as error:
        raise ArtifactError(Problem(
            "eager-not-comparable", "the artifact cannot be compared with eager", forward_at(model), str(error),
            "check without --eager proves the artifact, and --numeric runs it against its own unsharded step")
        ) from error  # fmt: skip
    except EagerFailed as error:
        place = raised_at(error.raised) or forward_at(model)
        raise BuildError(Problem(
            "eager-failed", "the model cannot run a step itself", place, said(error.raised),
            "correct that line: python must be able to run forward and backward")
        ) from error.raised  # fmt: skip
    if outcome.beyond:
        raise ArtifactError(differs(outcome))
    worst = max(outcome.errors, key=lambda label: outcome.errors[label] / outcome.limits[label])
    compared = f"{steps} steps of SGD: loss, gradients and parameters" + (", and the evaluation" if evaluation else "")
    dropped = ["            with dropout off: eager draws from another generator"] if draws(whole) else []
    return [
        f"eager       {compared} differ by at most {max(outcome.errors.values()):.0e}",
        f"            nearest to its limit is {worst}: {outcome.errors[worst]:.0e} of {outcome.limits[worst]:.0e}",
        *dropped,
    ]


def _refuse_other(manifest: Manifest, model: nn.Module, place: str) -> None:
    """Raise ArtifactError unless the model has the artifact's parameters."""
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in
            (*model.named_parameters(), *model.named_buffers())}  # fmt: skip
    wrong = [spec.name for spec in manifest.parameters if held.get(spec.name) != (DTYPES[spec.dtype], spec.shape)]
    if wrong:
        raise _mismatch(f"the model has other parameters than the artifact: {', '.join(wrong[:3])}", place)


def _batch(manifest: Manifest, model_file: ModelFile) -> Batch:
    """The example batch of the shapes that the artifact was built for: sizes and lengths are among its own."""
    wanted = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in manifest.batch}
    lengths = [wanted[name][1][dim] for name, dim in manifest.sequence_dims.items() if name in wanted]
    sizes = dict.fromkeys(size for _, shape in wanted.values() for size in shape)
    for size, length in product(sizes, dict.fromkeys((*lengths, *(length - 1 for length in lengths)))):
        try:
            batch = ask_batch(model_file, size, length)
        except BuildError:
            continue
        made = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(batch).items()}
        if made == wanted and constants_of(batch) == manifest.constants:
            return batch
    raise _mismatch("example_batch does not make the batch that the artifact was built for", model_file.stem)


def _mismatch(what: str, place: str) -> ArtifactError:
    return ArtifactError(Problem("model-mismatch", what, place, "the artifact is of another model, or of other options",
                                 "give the model file and the --set options that it was built with"))  # fmt: skip
