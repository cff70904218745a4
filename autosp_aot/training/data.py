"""What `run` trains on: text as bytes, token ids, random tokens or one stored batch.

    window       tokens[start : start + S]       sample n: start drawn from (seed, n) alone
    input_ids    B windows                       every integer [B, S] input is the same windows
    labels       B windows                       the same, where the model shifts labels itself; else those one later

Micro-batches are numbered through all replicas and steps: number m has samples m B to m B + B - 1. So a step has
the same samples however it is shared out. Ranks of a replica draw alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.operators import DTYPES
from autosp_aot.training.token_source import Source, open_source

NOT_TOKENS = ("mask", "position", "type", "segment")


@dataclass(frozen=True)
class Windows:
    """Batches of windows of a token source; `shifted` inputs have the tokens after those of the others.

    `vocabulary` None: not known, and all that the inputs can hold is taken.
    """

    inputs: tuple[TensorSpec, ...]
    source: Source
    vocabulary: int | None
    seed: int
    shifted: frozenset[str] = frozenset()

    def at(self, number: int) -> dict[str, Tensor]:
        """Micro-batch `number` of all, by input name; raises ArtifactError `token-out-of-range`."""
        rows, length = self.inputs[0].shape
        samples = range(number * rows, (number + 1) * rows)
        count = length + bool(self.shifted)
        tokens = np.stack([self.source.draw(np.random.default_rng((self.seed, n)), count) for n in samples])
        held = min(torch.iinfo(DTYPES[entry.dtype]).max for entry in self.inputs)
        last = held if self.vocabulary is None else self.vocabulary - 1
        if not 0 <= tokens.min() <= tokens.max() <= last:
            raise ArtifactError(Problem(
                "token-out-of-range", f"token ids reach from {tokens.min()} to {tokens.max()}",
                f"samples {samples.start} to {samples.stop - 1} of the data",
                f"the model has {'inputs' if self.vocabulary is None else 'embeddings'} for 0 to {last}",
                "give data made with this model's tokenizer, or build the model with a larger vocabulary",
            ))  # fmt: skip
        windows = {entry.name: tokens[:, count - length :] if entry.name in self.shifted else tokens[:, :length]
                   for entry in self.inputs}  # fmt: skip
        return {entry.name: torch.tensor(windows[entry.name], dtype=DTYPES[entry.dtype]) for entry in self.inputs}


@dataclass(frozen=True)
class StoredBatch:
    """The same for every step, from a safetensors file: one micro-batch, or the rows of all `count` of a step.

    `inputs` have the shapes of one micro-batch. An input that is `count` times as long in dim 0 is cut.
    """

    inputs: tuple[TensorSpec, ...]
    path: Path
    count: int

    def at(self, number: int) -> dict[str, Tensor]:
        """Micro-batch `number` of all, by input name."""
        given, part = load_file(self.path), number % self.count
        return {
            entry.name: given[entry.name]
            if tuple(given[entry.name].shape) == entry.shape
            else given[entry.name][part * entry.shape[0] : (part + 1) * entry.shape[0]]
            for entry in self.inputs
        }


    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Every micro-batch that there is."""
        return map(self.at, range(self.count))


Feed = Windows | StoredBatch


def open_feed(
    inputs: tuple[TensorSpec, ...], seed: int, data: Path | None, batch_file: Path | None, count: int = 1,
    shifted: frozenset[str] = frozenset(),
) -> Feed:  # fmt: skip
    """The micro-batches of a run, `count` a step; looks at sizes only, so that a large corpus costs nothing.

    `inputs` are the inputs of forward with their whole shapes, `shifted` those that get the next tokens. Raises
    ArtifactError: `batch-mismatch` and `no-tokens-for-input` with all offenders, and what `open_source` raises.
    """
    if batch_file is not None:
        _check_batch(inputs, batch_file, count)
        return StoredBatch(inputs, batch_file, count)
    _check_token_inputs(inputs)
    vocabulary = min((entry.vocabulary for entry in inputs if entry.vocabulary is not None), default=None)
    return Windows(inputs, open_source(vocabulary, data, inputs[0].shape[1] + bool(shifted)), vocabulary, seed, shifted)


def _check_batch(inputs: tuple[TensorSpec, ...], path: Path, count: int) -> None:
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(Problem("batch-unreadable", f"{path} is not a safetensors file", why=str(error))) from error
    one = {entry.name: (DTYPES[entry.dtype], entry.shape) for entry in inputs}
    step = {name: (dtype, (count * shape[0], *shape[1:])) for name, (dtype, shape) in one.items() if shape}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    cut = {one[name] for name in step if found.get(name) == step[name] != one[name]}
    problems = []
    for name in sorted(one.keys() | found.keys()):
        kinds = (step,) if one.get(name) in cut else (one, step)
        wanted = list(dict.fromkeys(kind[name] for kind in kinds if name in kind))
        if found.get(name) not in wanted:
            described = " or, for all of a step, ".join(map(_described, wanted))
            problems.append(Problem(
                "batch-mismatch", f"{name}: the file holds {_described(found.get(name))}", str(path),
                f"the program was built for {described}" if wanted else "forward takes none of that name from a file",
                "change the file, or build for this batch",
            ))  # fmt: skip
    for entry in inputs:
        ids = given.get(entry.name)
        if entry.vocabulary is not None and ids is not None and not 0 <= ids.min() <= ids.max() < entry.vocabulary:
            problems.append(Problem(
                "token-out-of-range", f"{entry.name}: token ids reach from {ids.min()} to {ids.max()}", str(path),
                f"the model has embeddings for 0 to {entry.vocabulary - 1}",
                "change the file, or build the model with a larger vocabulary",
            ))  # fmt: skip
    if problems:
        raise ArtifactError(*problems)


def _described(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return f"{str(kind[0]).removeprefix('torch.')} {list(kind[1])}" if kind else "nothing of that name"


def _check_token_inputs(inputs: tuple[TensorSpec, ...]) -> None:
    """Tokens are right for integer [B, S] inputs of one shape whose name does not say that they are something else."""
    shape = inputs[0].shape if inputs else ()
    problems = [
        Problem(
            "no-tokens-for-input", f"forward takes {entry.name}: {entry.dtype} {list(entry.shape)}, not tokens",
            why="run fills integer inputs of one shape [batch, sequence] with tokens and cannot make up anything else",
            fix="give the whole batch with --batch-file FILE.safetensors",
        )
        for entry in inputs
        if entry.dtype not in ("i64", "i32") or len(entry.shape) != 2 or entry.shape != shape
        or any(word in entry.name for word in NOT_TOKENS)
    ]  # fmt: skip
    if problems:
        raise ArtifactError(*problems)
