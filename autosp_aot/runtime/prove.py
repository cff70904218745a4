"""The proof of an artifact: its per-rank programs are equivalent to its unsharded ones, and can be run as they are.

Done when an artifact is built, by `check`, and before it first runs on a machine (`proved.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autosp_aot.artifact.manifest import BUFFERS, STEP, Manifest, TensorSpec
from autosp_aot.artifact.read import read_bodies, read_recipe, read_tensors, read_whole
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Int, Program, Value
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ir.verify import illegal, verify
from autosp_aot.ir.vocabularies import vocabularies
from autosp_aot.memory.costs import curve
from autosp_aot.memory.rank_classes import unlike_ranks
from autosp_aot.proof.collectives import Collective, check_collectives, collectives_by_rank
from autosp_aot.proof.derive import derive
from autosp_aot.runtime.operators import check_operators

Bodies = Sequence[tuple[tuple[int, ...], Program]]  # the ranks that run each


@dataclass(frozen=True)
class Proved:
    """One program of an artifact: the unsharded one, its bodies, and how often its ranks meet."""

    whole: Program
    bodies: Bodies
    meetings: int


def prove_artifact(path: Path, manifest: Manifest) -> dict[str, Proved]:
    """Prove the programs of an artifact, whose files have their hashes. Raises ArtifactError.

    Programs are legal, operators allowed and unchanged; every call can be made, with operands that lie as its kernel
    reads them; every line follows from the unsharded program by the sharding rules; ranks meet in the same collectives.
    The manifest's inputs and trainable parameters are the programs', and buffers those that it says. Weights are
    checked by who reads them.
    """
    proved = {}
    for kind in manifest.programs:
        whole, bodies = read_whole(path, manifest, kind), read_bodies(path, manifest, kind)
        for program in (whole, *(program for _, program in bodies)):
            check_operators(program, manifest)
        verify(whole)
        moved = next((instr for instr in whole.instrs() if instr.op in STRUCTURE), None)
        if moved is not None:
            raise illegal(f"{moved.op} in an unsharded program", moved)
        curve(whole, 0, manifest.target, copying=True)  # every call can be made, and makes what it says
        proved[kind] = Proved(whole, bodies, prove(whole, bodies))
        for ranks, program in bodies:
            for rank in unlike_ranks(program, ranks):
                curve(program, rank, manifest.target)
        _check_inputs(manifest, whole)
        _check_given(manifest, whole, kind)
    _check_buffers(manifest, path)
    read_recipe(path, manifest)
    return proved


def prove(whole: Program, bodies: Bodies) -> int:
    """Prove that `bodies`, legal programs with the ranks that run each, are equivalent to `whole`; how often they meet.

    Raises ArtifactError: `collective-mismatch`, `placement-wrong`.
    """
    by_rank: dict[int, list[Collective]] = {}
    for ranks, program in bodies:
        by_rank |= collectives_by_rank(program, ranks)
    check_collectives([by_rank[rank] for rank in sorted(by_rank)])
    for ranks, program in bodies:
        derive(program, whole, ranks)
    return len(by_rank[0])


def _check_inputs(manifest: Manifest, whole: Program) -> None:
    """The manifest's inputs are the unsharded program's."""
    state = {spec.name: _type(spec) for spec in (*manifest.parameters, *manifest.buffers)}
    batch = {spec.name: _type(spec) for spec in manifest.batch}
    for entry in whole.inputs:
        known = {"batch": batch, "parameter": state, "buffer": state}.get(entry.kind)
        if known is not None and known.get(entry.value.name) != (entry.value.dtype, entry.value.shape):
            raise wrong(entry.value.name, known.get(entry.value.name), _type(entry.value))
    inputs = {entry.value.name for entry in whole.inputs if entry.kind == "batch"}
    if set(batch) != inputs:
        raise wrong("the inputs", sorted(batch), sorted(inputs))


def _check_given(manifest: Manifest, whole: Program, kind: str) -> None:
    """A step gives loss and gradients of what is trained, an evaluation the loss; vocabularies are the step's."""
    trained = sorted(manifest.trainable) if kind == STEP else []
    given = sorted(label.removeprefix("grad.") for label, _ in whole.sections[0].gives if label != "loss")
    if trained != given:
        raise wrong("the trained parameters", trained, given)
    said = {spec.name: spec.vocabulary for spec in manifest.batch}
    held = {name: vocabularies(whole).get(name) for name in said}
    if kind == STEP and said != held:
        raise wrong("vocabularies", said, held)


def _check_buffers(manifest: Manifest, path: Path) -> None:
    """The file of buffers holds what the manifest says, no more."""
    said = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in manifest.buffers}
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_tensors(path, manifest, BUFFERS).items()}
    if said != held:
        raise wrong(BUFFERS, said, held)


def _type(spec: TensorSpec | Value) -> tuple[str, tuple[Int, ...]]:
    return spec.dtype, spec.shape


def wrong(what: str, said: object, held: object) -> ArtifactError:
    """The error for a manifest that says of an artifact what is not so."""
    why = f"it says {said}\nthe artifact holds {held}"
    problem = Problem("manifest-wrong", f"the manifest is wrong about {what}", why=why, fix="build the artifact again")
    return ArtifactError(problem)
