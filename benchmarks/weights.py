"""Load and save weights of Llama-3.1-8B's shape as Hugging Face folders: seconds, and how much memory beside the model.

    python -m benchmarks.weights [--layers 32] [--into DIR]

Writes a folder of bf16 safetensors in files of 5 GB (16 GB in all), loads it into an artifact of one rank in a fresh
process, saves it from there, and deletes both. The peak is that of anonymous memory, sampled every 5 ms, over what the
process had before it loads: pages of mapped files are the page cache's. Exit code 1 where it is over 1.2 times the
parameters.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build_file
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.load import load
from autosp_aot.runtime.weights_out import save_weights
from benchmarks.build import MODEL, SHAPE

LIMIT = 1.2
GB = 10**9


@dataclass(frozen=True)
class Taken:
    """What loading or saving took: anonymous memory more than before, at its peak."""

    seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--into", type=Path, help="Where there is room for it twice; default: for temporary files")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps([asdict(taken) for taken in measure(arguments.measure)]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.into) as scratch:
        folder = Path(scratch)
        options = {**SHAPE, "num_hidden_layers": arguments.layers}
        build_file(MODEL, BuildConfig(1, "cpu"), 64, options=options, out=folder / "artifact", weights=False)
        size = write(folder / "artifact", folder / "weights")
        command = [sys.executable, "-m", "benchmarks.weights", "--measure", str(folder)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"parameters {size / GB:.2f} GB, bf16")
    loaded, saved = (Taken(**taken) for taken in found)
    print(f"load       {loaded.seconds:.1f} s, peak {loaded.peak_bytes / size:.3f} of the parameters (limit {LIMIT})")
    print(f"save       {saved.seconds:.1f} s, peak {saved.peak_bytes / size:.3f} of the parameters more")
    sys.exit(loaded.peak_bytes > LIMIT * size)


def write(artifact: Path, folder: Path) -> int:
    """Write a checkpoint of random values, in a matrix the same rows over and over; the bytes of all parameters."""
    manifest = read_manifest(artifact)
    tensors = {
        spec.name: torch.randn(spec.shape[-1], dtype=torch.bfloat16).expand(spec.shape) for spec in manifest.parameters
    }
    save_weights(artifact, manifest, tensors, folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(folder: Path) -> list[Taken]:
    """Load and save, in a process that does nothing else."""
    with taking() as loading:
        module = load(folder / "artifact", folder / "weights", comm=Group(0, 1, torch.device("cpu")))
    with taking() as saving:
        save_weights(folder / "artifact", module.manifest, module.state_dict(), folder / "saved")
    return [*loading, *saving]


@contextmanager
def taking():
    """A list that has what the block took, after it."""
    found: list[Taken] = []
    before, started, done = anonymous_bytes(), time.perf_counter(), threading.Event()
    peaks = [before]
    sampler = threading.Thread(target=sample, args=(peaks, done))
    sampler.start()
    yield found
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    found.append(Taken(seconds, max(peaks) - before))


def sample(peaks: list[int], done: threading.Event) -> None:
    while not done.wait(0.005):
        peaks.append(max(anonymous_bytes(), peaks.pop()))


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    main()
