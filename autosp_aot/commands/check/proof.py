"""`autosp-aot check`: the proof that an artifact's per-rank programs are equivalent to the unsharded ones."""

from pathlib import Path

from autosp_aot.artifact.manifest import BUFFERS, EVALUATE, STEP, Manifest, TensorSpec
from autosp_aot.artifact.read import read_bodies, read_manifest, read_recipe, read_tensors, read_whole
from autosp_aot.commands.check.random_inputs import vocabularies
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.program import Int, Program, Value
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ir.verify import illegal, verify
from autosp_aot.memory.costs import costs, curve
from autosp_aot.passes import decisions
from autosp_aot.passes.lay_out import lay_out
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.step import Step
from autosp_aot.proof.collectives import Collective, check_collectives, collectives_by_rank
from autosp_aot.proof.derive import derive
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.runtime.load import check_operators
from autosp_aot.runtime.module import refuse_taken
from autosp_aot.runtime.weights_in import read_weights


def check(path: str | Path) -> list[str]:
    """Prove an artifact; what was proved, a line each. Raises ArtifactError at the first thing that does not hold.

    Files have their hashes; programs parse and are legal; operators are allowed and unchanged; every line follows from
    the unsharded program by the sharding rules, with every rank's numbers; all ranks meet in the same collectives with
    equal sizes; the manifest says of inputs, values, decisions and costs what the programs and files hold; a checkpoint
    is made up of the parameters, and they of it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    proved = {kind: _proved(path, manifest, kind) for kind in manifest.programs}
    _check_values(manifest, path)
    read_recipe(path, manifest)
    (bodies, lines, meetings), evaluation = proved[STEP], proved.get(EVALUATE)
    return [
        f"files       {len(manifest.files)} with the hashes of the manifest",
        f"programs    {manifest.ranks} ranks, {bodies} bodies, {lines} lines, each derived from the unsharded program",
        f"collectives {meetings} a rank: kind, order, sizes and dtype agree",
        *([f"evaluation  {evaluation[1]} lines, {evaluation[2]} collectives a rank: the same"] if evaluation else []),
        f"operators   {len(manifest.operators)} allowed, with the schemas of this torch",
    ]


def read_back(path: Path) -> None:
    """Read what a build has just written, and prove it. Raises ArtifactError.

    What the manifest repeats of it, decisions and costs, was computed from the same programs and is left to `check`.
    """
    manifest = read_manifest(path)
    for kind in manifest.programs:
        _prove_read(path, manifest, kind)
    _check_values(manifest, path)
    read_recipe(path, manifest)
    refuse_taken(manifest)


def _prove_read(
    path: Path, manifest: Manifest, kind: str
) -> tuple[Program, list[tuple[tuple[int, ...], Program]], int]:
    """Read and prove one program of an artifact: for one device, its bodies with their ranks, how often these meet."""
    whole, bodies = read_whole(path, kind), read_bodies(path, kind)
    for program in (whole, *(program for _, program in bodies)):
        check_operators(program, manifest)
    verify(whole)
    moved = next((instr for instr in whole.instrs() if instr.op in STRUCTURE), None)
    if moved is not None:
        raise illegal(f"{moved.op} in an unsharded program", moved)
    curve(lay_out(whole, manifest.target), 0, manifest.target)  # every call can be made, and makes what it says
    return whole, bodies, prove(whole, bodies)


def _proved(path: Path, manifest: Manifest, kind: str) -> tuple[int, int, int]:
    """Prove one program of an artifact; its bodies, their lines, and how often its ranks meet."""
    whole, bodies, meetings = _prove_read(path, manifest, kind)
    _check_inputs(manifest, whole)
    _check_given(manifest, whole, kind)
    _check_decisions(manifest, kind, whole, [program for _, program in bodies])
    if len(bodies) == 1:
        _check_costs(manifest, kind, bodies[0][1])
    return len(bodies), sum(1 for _, program in bodies for _ in program.instrs()), meetings


def prove(whole: Program, bodies: list[tuple[tuple[int, ...], Program]]) -> int:
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
            raise _wrong(entry.value.name, known.get(entry.value.name), _type(entry.value))
    inputs = {entry.value.name for entry in whole.inputs if entry.kind == "batch"}
    if set(batch) != inputs:
        raise _wrong("the inputs", sorted(batch), sorted(inputs))


def _check_given(manifest: Manifest, whole: Program, kind: str) -> None:
    """A step gives loss and gradients of what is trained, an evaluation the loss; vocabularies are the step's."""
    trained = sorted(manifest.trainable) if kind == STEP else []
    given = sorted(label.removeprefix("grad.") for label, _ in whole.sections[0].gives if label != "loss")
    if trained != given:
        raise _wrong("the trained parameters", trained, given)
    said = {spec.name: spec.vocabulary for spec in manifest.batch}
    held = {name: vocabularies(whole).get(name) for name in said}
    if kind == STEP and said != held:
        raise _wrong("vocabularies", said, held)


def _check_decisions(manifest: Manifest, kind: str, whole: Program, programs: list[Program]) -> None:
    """The decisions, taken again, place every value as the programs do (tiles' own left out), and fall back alike."""
    said = manifest.programs[kind]
    taken = decisions.read(said.cuts, said.decisions)
    replayed = Partition(manifest.ranks, taken)(Step(whole, whole, manifest.sequence_dims))
    if replayed.fallbacks != said.fallbacks:
        raise _wrong("fallbacks", said.fallbacks, replayed.fallbacks)
    placed = replayed.program.values()
    for values in map(Program.values, programs):
        for name in whole.values().keys() & values.keys():
            if placed[name].placement != values[name].placement:
                raise _wrong(f"the decision of {name}", placed[name].placement, values[name].placement)


def _check_values(manifest: Manifest, path: Path) -> None:
    """The tensor files hold what the manifest says, no more."""
    said = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in manifest.buffers}
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_tensors(path, BUFFERS).items()}
    if said != held:
        raise _wrong(BUFFERS, said, held)
    if manifest.has_weights:
        read_weights(path, manifest, None)


def _check_costs(manifest: Manifest, kind: str, program: Program) -> None:
    said = manifest.programs[kind].costs
    for name, number in vars(costs(program, manifest.target)).items():
        if getattr(said, name) != number:
            raise _wrong(name, getattr(said, name), number)


def _type(spec: TensorSpec | Value) -> tuple[str, tuple[Int, ...]]:
    return spec.dtype, spec.shape


def _wrong(what: str, said: object, held: object) -> ArtifactError:
    why = f"it says {said}\nthe artifact holds {held}"
    problem = Problem("manifest-wrong", f"the manifest is wrong about {what}", why=why, fix="build the artifact again")
    return ArtifactError(problem)
