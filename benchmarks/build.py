"""Build Llama-3.1-8B at 131,072 positions for 8 and for 64 ranks, each in a fresh process, against the limits.

    python -m benchmarks.build [--seq 131072] [--layers 32] [--sp 8 64]

Time and memory are those of `autosp-aot build --no-weights` from the moment torch is imported; everything else is read
from the artifact that was written. Exit code 1 where a limit is passed.

Exchanged are, in forward and for each layer, the heads of q and of the output once, and each key/value head once for
every rank that attends with it: N + N + 2 max(K, P) heads of S positions, over all ranks.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_bodies, read_manifest, read_whole
from autosp_aot.commands.build.builder import build_file
from autosp_aot.ir.program import ITEMSIZE, PerRank, Program, Value, map_ints
from autosp_aot.proof.collectives import collectives_of

HEADS, KV_HEADS, WIDTH = 32, 8, 128
SHAPE = {
    "vocab_size": 128256, "hidden_size": HEADS * WIDTH, "intermediate_size": 14336, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
MODEL = Path(__file__).parent.parent / "examples" / "llama.py"
MB = 10**6


@dataclass(frozen=True)
class Build:
    """What one build took and what it wrote; the values are the largest of the whole and of a rank's program."""

    seconds: float
    memory_bytes: int
    artifact_bytes: int
    whole_value: Value
    rank_value: Value
    exchanged_bytes: int
    expected_bytes: int
    gathered: tuple[int, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seq", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sp", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.into:
        build_here(args.sp[0], args.seq, args.layers, args.into)
        return
    builds = {ranks: build_afresh(ranks, args.seq, args.layers) for ranks in args.sp}
    checks = [check for ranks, build in builds.items() for check in limits(ranks, build, args.seq)]
    small, large = builds[args.sp[0]], builds[args.sp[-1]]
    pair = f"sp={args.sp[-1]} : sp={args.sp[0]}"
    checks += [
        (f"{pair}, time", f"{large.seconds / small.seconds:.2f}", "1.5", large.seconds <= 1.5 * small.seconds),
        (f"{pair}, size", f"{large.artifact_bytes / small.artifact_bytes:.2f}", "1.2",
         large.artifact_bytes <= 1.2 * small.artifact_bytes),
    ]  # fmt: skip
    for what, found, limit, fits in checks:
        print(f"{what:48} {found:>14}  limit {limit:14} {'' if fits else 'NOT KEPT'}".rstrip())
    sys.exit(not all(fits for *_, fits in checks))


def limits(ranks: int, build: Build, seq: int) -> Iterator[tuple[str, str, str, bool]]:
    """(what, found, limit, whether it fits) of a build."""
    said = f"sp={ranks}: "
    yield f"{said}seconds", f"{build.seconds:.1f}", "60", build.seconds < 60
    yield f"{said}peak memory, MB", f"{build.memory_bytes / MB:.0f}", "4000", build.memory_bytes < 4000 * MB
    yield f"{said}artifact, MB", f"{build.artifact_bytes / MB:.2f}", "20", build.artifact_bytes < 20 * MB
    for where, value in (("whole", build.whole_value), ("rank", build.rank_value)):
        elements = prod(value.shape)
        yield (
            f"{said}largest value, {where} {list(value.shape)}",
            f"{elements:.3g}",
            f"{seq**2:.3g} (S x S)",
            elements < seq**2,
        )
    exact = build.exchanged_bytes == build.expected_bytes
    yield f"{said}exchanged, bytes a layer", str(build.exchanged_bytes), f"{build.expected_bytes} (exactly)", exact
    count, name = build.gathered
    yield f"{said}gathered or reduced, bytes: {name}", str(count), str(2**16), count <= 2**16


def build_here(ranks: int, seq: int, layers: int, path: Path) -> None:
    """Build, and print time and memory of this process."""
    torch.set_num_threads(2)
    started = time.perf_counter()
    options = SHAPE | {"num_hidden_layers": layers}
    build_file(MODEL, BuildConfig(ranks, strict=True), seq, options=options, out=path, weights=False)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def build_afresh(ranks: int, seq: int, layers: int) -> Build:
    """Build in a process of its own, and look at what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "llama")
        size = ["--sp", str(ranks), "--seq", str(seq), "--layers", str(layers)]
        command = [sys.executable, "-m", "benchmarks.build", *size, "--into", str(path)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=MODEL.parent.parent)
        seconds, memory_bytes = json.loads(done.stdout)
        files = (path / name for name in (*read_manifest(path).files, "manifest.json"))
        artifact_bytes = sum(file.stat().st_size for file in files)
        whole, ((_, program),) = (read(path, read_manifest(path)) for read in (read_whole, read_bodies))
    heads = 2 * HEADS + 2 * max(KV_HEADS, ranks)
    expected_bytes = heads * WIDTH * seq * ITEMSIZE["bf16"]
    exchanged_bytes = exchanged(program) // layers
    values = largest(whole), largest(program)
    return Build(seconds, memory_bytes, artifact_bytes, *values, exchanged_bytes, expected_bytes, gathered(program))


def largest(program: Program) -> Value:
    """The value of most elements on any rank."""
    widest = map_ints(program, lambda n: max(n.values) if isinstance(n, PerRank) else n)
    return max(widest.values().values(), key=lambda value: prod(value.shape))


def exchanged(program: Program) -> int:
    """Bytes of all all-to-alls in forward over all ranks, what a rank keeps for itself included."""
    return sum(
        sum(collective.receive_sizes) * ITEMSIZE[collective.dtype]
        for rank in range(program.ranks)
        for collective in collectives_of(program.for_rank(rank), rank)
        if (collective.section, collective.op) == ("forward", "all_to_all")
    )


def gathered(program: Program) -> tuple[int, str]:
    """Bytes and name of the largest all_gather or all_reduce before the section that sums gradients."""
    found = [
        (out.nbytes(), out.name)
        for section in program.sections
        if section.name != "sum_gradients"
        for instr in section.instrs
        if instr.op in ("all_gather", "all_reduce")
        for out in instr.values()
    ]
    return max(found, default=(0, "none"))


if __name__ == "__main__":
    main()
