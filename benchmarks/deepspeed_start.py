"""Launch to first step through autosp_aot.initialize, against an empty DeepSpeed engine on as many ranks.

    python -m benchmarks.deepspeed_start [--sp 2] [--dp 1] [--layers 2] [--hidden 128] [--seq 256] [--rounds 5]

    empty       deepspeed.initialize of a linear layer
    artifact    autosp_aot.initialize of examples/llama.py, weights read from the artifact

with one config (ZeRO 1, AdamW of torch). Timed is from torchrun's start to the end of the first step: forward, backward
and step of DeepSpeed. Both are started in turns, and each round gives a difference; the file cache is warm. Exit code 1
where the median is over 2 s. Said are also what rank 0 took of a processor, which other work on the machine changes
less, and how long a second step takes: it is the part of the first that is no start.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build_file

LIMIT_S = 2.0
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
DEFAULTS = {"sp": 2, "dp": 1, "layers": 2, "hidden": 128, "seq": 256, "rounds": 5}
MODEL = Path(__file__).parent.parent / "examples" / "llama.py"
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    options = {"num_hidden_layers": args.layers, "hidden_size": args.hidden}
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        artifact, config = Path(scratch, "artifact"), Path(scratch, "ds.json")
        config.write_text(json.dumps(CONFIG))
        build_file(MODEL, BuildConfig(args.sp, "cpu"), args.seq, options=options, out=artifact)
        for _ in range(args.rounds + 1):
            said = ((config,), (config, artifact))
            rounds.append([launched(args.sp * args.dp, Path(scratch, "said"), *paths) for paths in said])
    del rounds[0]  # fills the file cache
    print(f"{args.sp * args.dp} ranks, median of {args.rounds} rounds, s")
    for name, starts in zip(("empty", "artifact"), zip(*rounds)):
        wall, processor, second = (statistics.median(times) for times in zip(*starts))
        print(f"{name:10} launch to first step {wall:.2f}, of a processor {processor:.2f}   a second step {second:.3f}")
    beyond = [artifact - empty for (empty, *_), (artifact, *_) in rounds]
    median = statistics.median(beyond)
    print(f"beyond     {median:.2f}, from {min(beyond):.2f} to {max(beyond):.2f}   (limit {LIMIT_S})")
    sys.exit(median > LIMIT_S)


def launched(ranks: int, said: Path, *arguments: Path) -> tuple[float, float, float]:
    """Seconds from here to the end of rank 0's first step, those of a processor until then, those of a second step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    started = time.time()
    command = [*launcher, "-m", "benchmarks.deepspeed_rank", str(said), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | ALONE)
    (first, processor), (second, _) = json.loads(said.read_text())
    return first - started, processor, second - first


if __name__ == "__main__":
    main()
