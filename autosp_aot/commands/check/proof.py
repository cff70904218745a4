"""`autosp-aot check`: the proof of an artifact, and that its manifest says the truth of it."""

from pathlib import Path

from autosp_aot.artifact.manifest import EVALUATE, STEP, Manifest
from autosp_aot.artifact.read import read_manifest
from autosp_aot.ir.program import Program
from autosp_aot.memory.costs import costs
from autosp_aot.passes import decisions
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.step import Step
from autosp_aot.runtime.module import refuse_taken
from autosp_aot.runtime.prove import prove_artifact, wrong
from autosp_aot.runtime.proved import digest_of, remember
from autosp_aot.runtime.weights_in import read_weights


def check(path: str | Path) -> list[str]:
    """Prove an artifact; what was proved, a line each. Raises ArtifactError at the first thing that does not hold.

    Files have their hashes; then what `prove_artifact` says; the manifest says of decisions and costs what follows from
    the programs; a checkpoint is made up of the parameters, and they of it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    proved = prove_artifact(path, manifest)
    _check_weights(path, manifest)
    for kind, one in proved.items():
        _check_decisions(manifest, kind, one.whole, [program for _, program in one.bodies])
        if len(one.bodies) == 1:
            _check_costs(manifest, kind, one.bodies[0][1])
    remember(digest_of(path))
    lines = {kind: sum(1 for _, program in one.bodies for _ in program.instrs()) for kind, one in proved.items()}
    step, evaluation = proved[STEP], proved.get(EVALUATE)
    return [
        f"files       {len(manifest.files)} with the hashes of the manifest",
        f"programs    {manifest.ranks} ranks, {len(step.bodies)} bodies, {lines[STEP]} lines, each derived from the"
        " unsharded program",
        f"collectives {step.meetings} a rank: kind, order, sizes and dtype agree",
        *([f"evaluation  {lines[EVALUATE]} lines, {evaluation.meetings} collectives a rank: the same"] if evaluation
          else []),
        f"operators   {len(manifest.operators)} allowed, with the schemas of this torch",
    ]  # fmt: skip


def read_back(path: Path) -> None:
    """Read what a build has just written, and prove it. Raises ArtifactError.

    What the manifest repeats of it, decisions and costs, was computed from the same programs and is left to `check`.
    """
    manifest = read_manifest(path)
    prove_artifact(path, manifest)
    _check_weights(path, manifest)
    refuse_taken(manifest)
    remember(digest_of(path))


def _check_weights(path: Path, manifest: Manifest) -> None:
    """Stored weights are the parameters that the manifest says, no more."""
    if manifest.has_weights:
        read_weights(path, manifest, None)


def _check_decisions(manifest: Manifest, kind: str, whole: Program, programs: list[Program]) -> None:
    """The decisions, taken again, place every value as the programs do (tiles' own left out), and fall back alike."""
    said = manifest.programs[kind]
    taken = decisions.read(said.cuts, said.decisions)
    replayed = Partition(manifest.ranks, taken)(Step(whole, whole, manifest.sequence_dims))
    if replayed.fallbacks != said.fallbacks:
        raise wrong("fallbacks", said.fallbacks, replayed.fallbacks)
    placed = replayed.program.values()
    for values in map(Program.values, programs):
        for name in whole.values().keys() & values.keys():
            if placed[name].placement != values[name].placement:
                raise wrong(f"the decision of {name}", placed[name].placement, values[name].placement)


def _check_costs(manifest: Manifest, kind: str, program: Program) -> None:
    said = manifest.programs[kind].costs
    for name, number in vars(costs(program, manifest.target)).items():
        if getattr(said, name) != number:
            raise wrong(name, getattr(said, name), number)
