"""The batch that a model file gives, checked, and which dim of which input is the sequence.

That is found by asking for two lengths and comparing shapes; of a batch without a model file it is guessed, or said.
"""

from collections.abc import Mapping

from torch import Tensor

from autosp_aot.artifact.batches import Constant, constants_of, flat, tensors_of
from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.model_file import ModelFile
from autosp_aot.export.user_code import FAILURES, defined_at, raised_at, said


def make_batch(
    model_file: ModelFile, batch_size: int, seq_len: int
) -> tuple[dict[str, Tensor | Constant], dict[str, int]]:
    """The example batch, flat, and which dim of an input is the sequence. Raises BuildError naming all offenders."""
    place = defined_at(model_file.example_batch)
    # Twice the length, not one more: an example_batch may insist on a multiple of something.
    batch, longer = (ask_batch(model_file, batch_size, length) for length in (seq_len, 2 * seq_len))
    if batch.keys() != longer.keys():
        raise BuildError(_changes(f"the inputs {sorted(batch.keys() ^ longer.keys())} come and go", place))
    problems, sequence_dims, constants = [], {}, constants_of(batch)
    if any(type(longer[name]) is not type(value) or longer[name] != value for name, value in constants.items()):
        raise BuildError(_changes(f"one of the constants {sorted(constants)} changes", place))
    for name, tensor in tensors_of(batch).items():
        other = longer[name]
        if not isinstance(other, Tensor) or tensor.dtype != other.dtype or tensor.dim() != other.dim():
            problems.append(_changes(f"input {name!r} changes its dtype or its number of dims", place))
            continue
        before, after = tensor.shape, other.shape
        changed = [dim for dim in range(len(before)) if before[dim] != after[dim]]
        if len(changed) > 1:
            problems.append(
                Problem(
                    "sequence-dim-ambiguous",
                    f"dims {changed} of input {name!r} change with the length",
                    place,
                    "each input is cut along one sequence dim",
                    "give one sequence dim, and make the rest in forward",
                )
            )
        elif changed:
            sequence_dims[name] = changed[0]
    if not problems and not sequence_dims:
        problems.append(
            Problem(
                "no-sequence-dim",
                "no input changes its shape with the length",
                place,
                "the dim that changes is the sequence, which the ranks share",
                "use seq_len in example_batch",
            )
        )
    if problems:
        raise BuildError(*problems)
    return batch, sequence_dims


def guess_sequence_dims(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Dim 1 of every input with at least two dims.

    Integers [B, S] are tokens, whatever their length: a source's and a target's differ. Raises BuildError where dim 1
    of another input has no such length, unless all inputs agree.
    """
    sizes = {name: tensor.shape[1] for name, tensor in batch.items() if tensor.dim() >= 2}
    tokens = {t.shape[1] for t in batch.values() if t.dim() == 2 and not t.dtype.is_floating_point}
    if not sizes or (len(set(sizes.values())) > 1 and not tokens.issuperset(sizes.values())):
        said_sizes = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise BuildError(
            Problem(
                "sequence-dim-unknown",
                f"dim 1 of the inputs has no one size: {said_sizes or 'no input has it'}",
                "batch",
                "without two lengths to compare, the sequence is taken to be dim 1 of every input",
                'say which it is: sequence_dims={"input_ids": 1, ...}',
            )
        )
    return dict.fromkeys(sizes, 1)


def checked_sequence_dims(batch: Mapping[str, Tensor], dims: Mapping[str, int]) -> dict[str, int]:
    """The dims that were given, counted from the front. Raises BuildError unless they are there and of one size."""
    depth = {name: tensor.dim() for name, tensor in batch.items()}
    wrong = [name for name, dim in dims.items() if name not in batch or not -depth[name] <= dim < depth[name]]
    found = {name: dim % batch[name].dim() for name, dim in dims.items() if name not in wrong}
    sizes = {name: batch[name].shape[dim] for name, dim in found.items()}
    if wrong or len(set(sizes.values())) != 1:
        said = f"the batch has no dim {dims[wrong[0]]} of {wrong[0]!r}" if wrong else f"the sequence is {sizes} long"
        raise BuildError(
            Problem(
                "sequence-dim-unknown",
                said if dims else "no input has a sequence dim",
                "sequence_dims",
                "the ranks share one sequence, which is a dim of at least one input",
                'say which it is: sequence_dims={"input_ids": 1, ...}',
            )
        )
    return found


def ask_batch(model_file: ModelFile, batch_size: int, seq_len: int) -> dict[str, Tensor | Constant]:
    """`example_batch(batch_size, seq_len)`, flat. Raises BuildError."""
    place = defined_at(model_file.example_batch)
    try:
        batch = model_file.example_batch(batch_size, seq_len)
    except FAILURES as error:
        raise BuildError(
            Problem(
                "example-batch-failed",
                f"example_batch({batch_size}, {seq_len}) raised an exception",
                raised_at(error, inside=place) or place,
                said(error),
                "make it work for any batch size and length",
            )
        ) from error
    return flat_batch(batch, place)


def flat_batch(batch: Mapping, place: str) -> dict[str, Tensor | Constant]:
    """A batch by flat names. Raises BuildError, at `place`, naming all that cannot be part of one."""
    if not isinstance(batch, Mapping):
        raise BuildError(_not_tensors(f"the batch is {type(batch).__name__}", place))
    try:
        return flat(batch)
    except ValueError as error:
        raise BuildError(*(_not_tensors(f"in the batch, {line}", place) for line in str(error).splitlines())) from error


def _not_tensors(what: str, place: str) -> Problem:
    return Problem(
        "batch-not-tensors",
        what,
        place,
        "the batch is the keyword inputs of forward",
        "return a dict of tensors, or of dicts of them; None, flags, numbers and texts are constants of the build",
    )


def _changes(what: str, place: str) -> Problem:
    return Problem(
        "batch-changes",
        what,
        place,
        "a batch of another length differs in the sequence dim only",
        "return the same names, dtypes and numbers of dims for every length",
    )
