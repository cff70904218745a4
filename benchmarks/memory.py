"""Planned memory against what is taken, with the shapes. Exit code 1 where a plan is not kept.

    python -m benchmarks.memory [--only step] [--sp 2] [--seq 1024] [--layers 2] [--hidden 256] [--vocab 2048]
    python -m benchmarks.memory --only sweep

`step`: of one step of a built artifact, beside parameters and batch:

    counted     on real gloo processes, bytes of live storages, as a dispatch mode sees them made and freed
    allocated   by one process alone, what torch's allocator has handed out, inside of ATen's kernels too; it does not
                see what other threads free, and gloo's do

`sweep`: `autosp-aot plan` of Llama-3.1-8B at 4 lengths for 4 numbers of ranks, and how long it takes.

The plan leaves out blocks of ATen's CPU kernels, a few MiB a thread at any length (`BLOCKS_BYTES`). A module's step has
single numbers besides: the loss that it hands out, its gradient, and the guess of it (`LOSS_BYTES`).
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.autograd.profiler import profile

import autosp_aot
from autosp_aot.artifact.read import read_bodies, read_manifest
from autosp_aot.commands.plan.planning import Asked, Setting, sweep
from autosp_aot.commands.plan.report import plan_text
from autosp_aot.memory.costs import curve
from autosp_aot.targets.devices import DEVICES
from benchmarks.build import MODEL, SHAPE
from examples import llama
from tests.storages import Storages

DEFAULTS = {"sp": 2, "seq": 1024, "batch": 1, "layers": 2, "hidden": 256, "heads": 8, "kv-heads": 2, "vocab": 2048}
DTYPES, RECOMPUTE, TILES = ("float32", "bfloat16"), ("none", "sac", "full"), ("off", 4)
BLOCKS_BYTES, LOSS_BYTES = 4 * 2**20, 12
SWEPT_SP, SWEPT_SEQ, SWEEP_S = (1, 2, 4, 8), (2**15, 2**16, 2**17, 2**18), 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=["step", "sweep"], default="step")
    args = parser.parse_args()
    if args.only == "sweep":
        sys.exit(not sweep_8b())
    print(", ".join(f"{name} {getattr(args, name.replace('-', '_'))}" for name in DEFAULTS))
    print(f"{'':20} {'rank':>7} {'planned':>12} {'taken':>12} {'more':>9}")
    kept = [*step(args, args.sp, counted, LOSS_BYTES), *step(args, 1, allocated, LOSS_BYTES + BLOCKS_BYTES)]
    sys.exit(not all(kept))


# --- a plan -------------------------------------------------------------------------------------------------------


def sweep_8b() -> bool:
    """The table, and whether it was made in time."""
    device = DEVICES["a100-80"]
    setting = Setting(device, device.memory_bytes, reserve_bytes=3 * 2**30)
    started = time.perf_counter()
    points = sweep(Asked(MODEL, 1, SHAPE | {"num_hidden_layers": 32}, setting), SWEPT_SP, SWEPT_SEQ, jobs=2)
    seconds = time.perf_counter() - started
    print(plan_text(points, setting))
    print(f"\n{len(points)} points in {seconds:.0f} s (limit {SWEEP_S})")
    return seconds < SWEEP_S


# --- one step -----------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace, sp: int, measure: Callable, more_bytes: int) -> Iterator[bool]:
    """A line for each build and rank: whether it takes what was planned, and at most so many bytes more."""
    for dtype, recompute, tile in itertools.product(DTYPES, RECOMPUTE, TILES):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "artifact")
            torch.manual_seed(0)
            model = make_model(args, dtype)
            autosp_aot.build(model, make_batch(args), sp, path, target="cpu", recompute=recompute, tile=tile)
            mp.spawn(worker, (args, sp, folder, measure), sp)
            ((_, program),) = read_bodies(path, read_manifest(path))
            for rank in range(sp):
                planned = max(moment.peak_bytes for moment in curve(program, rank, "cpu"))
                more = int(Path(folder, str(rank)).read_text()) - planned
                print(f"{dtype:9}{recompute:5}{tile:>6} {rank:2} of {sp} {planned:12} {planned + more:12} {more:9}  "
                      f"{measure.__name__}")  # fmt: skip
                yield 0 <= more <= more_bytes


def worker(rank: int, args: argparse.Namespace, sp: int, folder: str, measure: Callable) -> None:
    """Write down the most that one step takes on a rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", sp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=sp)
    module = autosp_aot.load(f"{folder}/artifact")
    Path(folder, str(rank)).write_text(str(measure(module, make_batch(args))))
    dist.destroy_process_group()


def counted(module: nn.Module, batch: dict[str, Tensor]) -> int:
    """The most bytes of storages that were alive at once during a step."""
    with Storages([*module.parameters(), *module.buffers(), *batch.values(), *module.constants.values()]) as storages:
        module(**batch).backward()
    return storages.peak_bytes


def allocated(module: nn.Module, batch: dict[str, Tensor]) -> int:
    """The most bytes that were allocated at once during a step."""
    with profile(profile_memory=True) as profiled:
        module(**batch).backward()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def make_model(args: argparse.Namespace, dtype: str) -> nn.Module:
    return llama.build_model(
        dtype, vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads, max_position_embeddings=args.seq,
    )  # fmt: skip


def make_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    tokens = torch.randint(args.vocab, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main()
