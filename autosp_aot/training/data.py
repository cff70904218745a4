"""What `run` trains on: text as bytes, token ids, random tokens or one stored batch.

    window       tokens[start : start + S]       sample n: start drawn from (seed, n) alone
    input_ids    B windows                       every integer [B, S] input is the same windows
    labels       B windows                       (the model shifts labels itself)

Micro-batches are numbered through all replicas and steps: number m has samples m B to m B + B - 1. So a step has
the same samples however it is shared out. Ranks of a replica draw alike.
"""

import bisect
import codecs
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.runtime.execute import DTYPES

DRAWS = 1000
NOT_TOKENS = ("mask", "position", "type", "segment")


@dataclass(frozen=True)
class RandomTokens:
    """Tokens without meaning, in [0, vocabulary)."""

    vocabulary: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.integers(0, self.vocabulary, count)


@dataclass(frozen=True)
class TokenFile:
    """Token ids in a `.npy` file, of any shape and integer dtype, read where they are needed."""

    path: Path

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        tokens = np.load(self.path, mmap_mode="r", allow_pickle=False).reshape(-1)
        start = rng.integers(0, tokens.size - count + 1)
        return tokens[start : start + count].astype(np.int64)


@dataclass(frozen=True)
class Text:
    """Files end to end, a token a byte; `ends[i]` is where file i ends. Of a folder only windows of UTF-8 are drawn."""

    paths: tuple[Path, ...]
    ends: tuple[int, ...]
    only_utf8: bool

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        for _ in range(DRAWS):
            window = self._read(int(rng.integers(0, self.ends[-1] - count + 1)), count)
            if not self.only_utf8 or _is_utf8(window):
                return np.frombuffer(window, np.uint8).astype(np.int64)
        raise ArtifactError(Problem(
            "no-text", f"none of {DRAWS} places drawn holds {count} bytes of text", f"--data, {len(self.paths)} files",
            "windows that are not UTF-8 are passed over in a folder", "give a folder of text, or a single file",
        ))  # fmt: skip

    def _read(self, start: int, count: int) -> bytes:
        parts = []
        for at in range(bisect.bisect_right(self.ends, start), len(self.paths)):
            begin = self.ends[at - 1] if at else 0
            with self.paths[at].open("rb") as file:
                file.seek(start - begin)
                parts.append(file.read(min(count, self.ends[at] - start)))
            start, count = start + len(parts[-1]), count - len(parts[-1])
            if not count:
                break
        return b"".join(parts)


@dataclass(frozen=True)
class Windows:
    """Batches of windows of a token source. `vocabulary` None: not known, and all that the inputs can hold is taken."""

    inputs: tuple[TensorSpec, ...]
    source: RandomTokens | TokenFile | Text
    vocabulary: int | None
    seed: int

    def at(self, number: int) -> dict[str, Tensor]:
        """Micro-batch `number` of all, by input name; raises ArtifactError `token-out-of-range`."""
        rows, length = self.inputs[0].shape
        samples = range(number * rows, (number + 1) * rows)
        tokens = np.stack([self.source.draw(np.random.default_rng((self.seed, n)), length) for n in samples])
        held = min(torch.iinfo(DTYPES[entry.dtype]).max for entry in self.inputs)
        last = held if self.vocabulary is None else self.vocabulary - 1
        if not 0 <= tokens.min() <= tokens.max() <= last:
            raise ArtifactError(Problem(
                "token-out-of-range", f"token ids reach from {tokens.min()} to {tokens.max()}",
                f"samples {samples.start} to {samples.stop - 1} of the data",
                f"the model has {'inputs' if self.vocabulary is None else 'embeddings'} for 0 to {last}",
                "give data made with this model's tokenizer, or build the model with a larger vocabulary",
            ))  # fmt: skip
        return {entry.name: torch.from_numpy(tokens).to(DTYPES[entry.dtype]) for entry in self.inputs}


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


Feed = Windows | StoredBatch


def open_feed(
    inputs: tuple[TensorSpec, ...], seed: int, data: Path | None, batch_file: Path | None, count: int = 1
) -> Feed:
    """The micro-batches of a run, `count` a step; looks at sizes only, so that a large corpus costs nothing.

    `inputs` are the inputs of forward with their whole shapes. Raises ArtifactError: `batch-mismatch` and
    `no-tokens-for-input` with all offenders, `vocabulary-unknown`, `bad-token-file`, `data-too-short`.
    """
    if batch_file is not None:
        _check_batch(inputs, batch_file, count)
        return StoredBatch(inputs, batch_file, count)
    _check_token_inputs(inputs)
    vocabulary = min((entry.vocabulary for entry in inputs if entry.vocabulary is not None), default=None)
    source, size = _open_source(vocabulary, data)
    length = inputs[0].shape[1]
    if size is not None and size < length:
        raise ArtifactError(Problem(
            "data-too-short", f"{data} holds {size} tokens and a sequence has {length}",
            fix="give more data, or build with a shorter --seq",
        ))  # fmt: skip
    return Windows(inputs, source, vocabulary, seed)


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


def _open_source(vocabulary: int | None, data: Path | None) -> tuple[RandomTokens | TokenFile | Text, int | None]:
    """The token source and how many tokens it holds (None: no end)."""
    if data is None:
        if vocabulary is None:
            raise ArtifactError(Problem(
                "vocabulary-unknown", "random tokens need the number of token ids, which this model does not show",
                why="its token input is not read by an embedding", fix="give --data or --batch-file",
            ))  # fmt: skip
        return RandomTokens(vocabulary), None
    if data.suffix == ".npy":
        return TokenFile(data), _count_tokens(data)
    paths = tuple(_files(data)) if data.is_dir() else (data,)
    ends = tuple(itertools.accumulate(path.stat().st_size for path in paths))
    return Text(paths, ends, data.is_dir()), ends[-1] if ends else 0


def _count_tokens(path: Path) -> int:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactError(Problem("bad-token-file", f"{path} is no array to numpy", why=str(error))) from error
    if not isinstance(tokens, np.ndarray):
        raise ArtifactError(Problem("bad-token-file", f"{path} is an archive of arrays", why="run reads one array"))
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ArtifactError(Problem("bad-token-file", f"{path} holds {tokens.dtype}", why="token ids are integers"))
    return tokens.size


def _files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, by name; hidden ones and links to folders are left out."""
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(at, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _is_utf8(window: bytes) -> bool:
    """Whether bytes cut out of a longer text are UTF-8 without NUL; at both ends a character may be cut through."""
    first = next((at for at, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(window[first:])
    except UnicodeDecodeError:
        return False
