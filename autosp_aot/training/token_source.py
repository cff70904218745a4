"""Where tokens come from: UTF-8 text, a token a byte; arrays of token ids; or random numbers.

    corpus.txt       a file of text               corpus/    its files end to end, where they are text
    ids.npy          integers of any shape        shards/    .npy files alone: a window lies in one of them
"""

import bisect
import codecs
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autosp_aot.errors import ArtifactError, Problem

DRAWS = 1000
LOOKED_AT_BYTES = 2**16  # of a text before anything is drawn from it
# What is no text, or text only for a program that reads records.
OTHER_FORMATS = frozenset({
    ".arrow", ".bz2", ".feather", ".gz", ".h5", ".jsonl", ".lz4", ".ndjson", ".npz", ".parquet", ".pt", ".pth",
    ".safetensors", ".tar", ".tgz", ".xz", ".zip", ".zst",
})  # fmt: skip
LISTED = 3


@dataclass(frozen=True)
class RandomTokens:
    """Tokens without meaning, in [0, vocabulary)."""

    vocabulary: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` token ids: i64, 1-D."""
        return rng.integers(0, self.vocabulary, count)


@dataclass(frozen=True)
class TokenFiles:
    """Token ids in `.npy` files, of any shape and integer dtype, read where they are needed; `sizes` are theirs."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """A window of one of them, every one as likely."""
        ends = list(itertools.accumulate(max(size - count + 1, 0) for size in self.sizes))
        place = int(rng.integers(0, ends[-1]))
        at = bisect.bisect_right(ends, place)
        start = place - (ends[at - 1] if at else 0)
        tokens = np.load(self.paths[at], mmap_mode="r", allow_pickle=False).reshape(-1)
        return tokens[start : start + count].astype(np.int64)


@dataclass(frozen=True)
class Text:
    """Files end to end, a token a byte; `ends[i]` is where file i ends. Windows that are not UTF-8 are passed over."""

    paths: tuple[Path, ...]
    ends: tuple[int, ...]

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        for _ in range(DRAWS):
            window = self._read(int(rng.integers(0, self.ends[-1] - count + 1)), count)
            if _is_utf8(window):
                return np.frombuffer(window, np.uint8).astype(np.int64)
        raise ArtifactError(Problem(
            "no-text", f"none of {DRAWS} places drawn holds {count} bytes of text", f"--data, {len(self.paths)} files",
            "windows that are not UTF-8 are passed over", "give text, or token ids as .npy",
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


Source = RandomTokens | TokenFiles | Text


def open_source(vocabulary: int | None, data: Path | None, length: int) -> Source:
    """The source of windows of `length` tokens: `data`, or without it random ones.

    Raises ArtifactError: `vocabulary-unknown`, `data-format` for files of another format, `data-not-text`,
    `bad-token-file`, `data-too-short`.
    """
    if data is None:
        if vocabulary is None:
            raise ArtifactError(Problem(
                "vocabulary-unknown", "random tokens need the number of token ids, which this model does not show",
                why="its token input is not read by an embedding", fix="give --data or --batch-file",
            ))  # fmt: skip
        return RandomTokens(vocabulary)
    paths = tuple(_files(data)) if data.is_dir() else (data,)
    arrays = tuple(path for path in paths if path.suffix == ".npy")
    _refuse_formats(data, [path for path in paths if path.suffix.lower() in OTHER_FORMATS])
    if arrays and len(arrays) < len(paths):
        what = f"{data} has .npy files and others"
        raise ArtifactError(Problem("data-format", what, why="token ids and text are not mixed",
                                    fix="keep them in folders of their own"))  # fmt: skip
    source: TokenFiles | Text
    if arrays:
        source = TokenFiles(arrays, tuple(map(_count_tokens, arrays)))
        longest = max(source.sizes)
    else:
        ends = tuple(itertools.accumulate(path.stat().st_size for path in paths))
        source, longest = Text(paths, ends), ends[-1] if ends else 0
    if longest < length:
        raise ArtifactError(Problem(
            "data-too-short", f"{data} holds {longest} tokens in a row and a sequence has {length}",
            fix="give more data, or build with a shorter --seq",
        ))  # fmt: skip
    if isinstance(source, Text) and not data.is_dir():
        with data.open("rb") as file:
            if not _is_utf8(file.read(LOOKED_AT_BYTES)):
                raise _no_text(data, f"its first {min(longest, LOOKED_AT_BYTES)} bytes are none")
    return source


def _refuse_formats(data: Path, others: list[Path]) -> None:
    if not others:
        return
    names = ", ".join(str(path.relative_to(data)) if data.is_dir() else path.name for path in others[:LISTED])
    more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
    raise ArtifactError(Problem(
        "data-format", f"run does not read {names}{more}", f"--data {data}",
        "it reads UTF-8 text, a token a byte, and .npy files of token ids; a file of another format would be trained "
        "on as the bytes that it consists of",
        "write the text to .txt files, or its token ids with numpy.save('ids.npy', ids)",
    ))  # fmt: skip


def _no_text(path: Path, why: str) -> ArtifactError:
    return ArtifactError(Problem(
        "data-not-text", f"{path} is not UTF-8 text", why=why,
        fix="convert it (iconv -t UTF-8 for text in another encoding), or give token ids as .npy",
    ))  # fmt: skip


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
