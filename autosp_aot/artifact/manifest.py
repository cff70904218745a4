"""What an artifact is: a folder of text and safetensors, written at once and read strictly.

    manifest.json        what it is, what it was built from, inputs, parameters, costs, hashes of all other files
    whole.program        the canonical unsharded step
    body.0.program       the text that ranks of one structure share
    ranks.json           by rank: its body, and the constants that differ
    evaluate.*           optional: the same three of the program that gives the loss in eval mode
    checkpoint.json      how a checkpoint of the model names and lays out its tensors, and its config
    buffers.safetensors  values that a checkpoint does not hold
    weights/             optional: initial weights
    report.html          the same facts for people

No pickle, no eval; the same build gives the same bytes anywhere.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosp_aot.artifact.batches import Constant
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.errors import Problem
from autosp_aot.ir.program import Value
from autosp_aot.memory.costs import Costs

FORMAT = 7  # docs/format.md has the history, tests/artifact/formats an artifact of each from 5 on
# The releases that read a format, as people say them. What is not here was written by development versions alone.
READ_BY = {7: "0.1.0"}
MANIFEST = "manifest.json"
WEIGHTS = "weights/model.safetensors"
BUFFERS = "buffers.safetensors"
WHOLE = "whole.program"
RANKS = "ranks.json"
CHECKPOINT = "checkpoint.json"
REPORT = "report.html"
BODY = re.compile(r"body\.\d+\.program")
# The programs of an artifact; one built without evaluation has the step alone.
STEP, EVALUATE = "step", "evaluate"

Json = dict[str, Any]  # an object of a JSON file


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, dtype (`f32`) and whole shape; `vocabulary` is the number of ids it may hold, where known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    vocabulary: int | None = None


@dataclass(frozen=True)
class Fallback:
    """An operator that computes replicated: on every rank, over the whole. `source` is the user's file and line."""

    op: str
    source: str
    gathered_bytes: int


@dataclass(frozen=True)
class ProgramFacts:
    """What a manifest says of a program.

    costs       of the rank with the highest peak
    fallbacks   what computes replicated
    cuts        intervals of all ranks, by the name that decisions use
    decisions   the strategy of each call that is not computed whole on every rank, by its first result
    """

    costs: Costs
    fallbacks: tuple[Fallback, ...]
    cuts: dict[str, str]
    decisions: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    versions      of the packages that decide the bytes: torch, and those the model's classes come from
    source        sha256 of the model file, its options and the build's options ("" for a model built in Python)
    config        the options of the build
    compared      what of it the build compared with eager, or why nothing
    constants     what else the batch held when it was built, None, flags, numbers and texts by name
    aliases       further names of parameters and buffers (tied weights): name -> name it is stored under
    trainable     names of the parameters that get gradients
    operators     schema of every operator of the programs
    programs      what is said of each program, by its name: `step`, and `evaluate` where the artifact has it
    """

    format: int
    versions: dict[str, str]
    source: str
    compared: str
    config: BuildConfig
    sequence_dims: dict[str, int]
    batch: tuple[TensorSpec, ...]
    constants: dict[str, Constant]
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    aliases: dict[str, str]
    trainable: tuple[str, ...]
    operators: dict[str, str]
    programs: dict[str, ProgramFacts]
    files: dict[str, str]

    @property
    def has_weights(self) -> bool:
        return WEIGHTS in self.files

    @property
    def ranks(self) -> int:
        return self.config.ranks

    @property
    def target(self) -> str:
        return self.config.target

    @property
    def step(self) -> ProgramFacts:
        return self.programs[STEP]

    @property
    def evaluation(self) -> ProgramFacts | None:
        return self.programs.get(EVALUATE)

    @property
    def vocabulary(self) -> int | None:
        """How many token ids there are; None where no input is looked up in an embedding."""
        return min((spec.vocabulary for spec in self.batch if spec.vocabulary is not None), default=None)


def specs(values: list[Value], vocabularies: Mapping[str, int] | None = None) -> tuple[TensorSpec, ...]:
    """Tensor specs of whole values."""
    known = vocabularies or {}
    return tuple(TensorSpec(v.name, v.dtype, v.whole_shape, known.get(v.name)) for v in values)


def file_of(program: str, name: str) -> str:
    """The file `name` of a program: the step's have no prefix."""
    return name if program == STEP else f"{program}.{name}"


def no_evaluation(where: str) -> Problem:
    """Of an artifact that was asked for what it was built without."""
    why, fix = "it was built with --no-evaluation", "build it without that option"
    return Problem("no-evaluation", "the artifact has no evaluation program", where, why, fix)


def sealed(manifest: Json) -> str:
    """The text of manifest.json: the manifest and its own hash."""
    whole = {"sha256": _hash(manifest), "manifest": manifest}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def _hash(manifest: Json) -> str:
    return hashlib.sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
