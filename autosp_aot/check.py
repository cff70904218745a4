"""`autosp-aot check`: the proof that an artifact's programs, all ranks together, are the whole step."""

from pathlib import Path

from autosp_aot.artifact import read_bodies, read_manifest, read_whole
from autosp_aot.collectives import check_collectives, collectives_of
from autosp_aot.derive import derive
from autosp_aot.runtime.load import check_operators
from autosp_aot.verify import verify


def check(path: str | Path) -> list[str]:
    """Prove an artifact; what was proved, a line each. Raises ArtifactError at the first thing that does not hold.

    Files have their hashes; programs parse and are legal; operators are allowed and unchanged; every line follows from the
    whole step by the sharding rules, with every rank's numbers; all ranks meet in the same collectives with equal sizes.
    """
    path = Path(path)
    manifest = read_manifest(path)
    whole, bodies = read_whole(path), read_bodies(path)
    verify(whole)
    by_rank = [[] for _ in range(manifest.ranks)]
    lines = 0
    for ranks, program in bodies:
        check_operators(program, manifest)
        for rank in ranks:
            by_rank[rank] = collectives_of(program.for_rank(rank), rank)
    check_collectives(by_rank)
    for ranks, program in bodies:
        derive(program, whole, ranks)
        lines += sum(1 for _ in program.instrs())
    return [
        f"files       {len(manifest.files)} with the hashes of the manifest",
        f"programs    {manifest.ranks} ranks, {len(bodies)} bodies, {lines} lines, each derived from the whole step",
        f"collectives {len(by_rank[0])} a rank: kind, order, sizes and dtype agree",
        f"operators   {len(manifest.operators)} allowed, with the schemas of this torch",
    ]
