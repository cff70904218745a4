"""One rank of real DeepSpeed engines, one after the other; started by test_engine.py.

    python deepspeed_runs.py ARTIFACT RUNS.json OUT        RUNS: a list of {"zero": 1, "accumulate": 3, "clip": 0.3}

Writes OUT/<number of the run>.safetensors: the losses of all steps and the parameters at the end.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from safetensors.torch import save_file

import autosp_aot
from autosp_aot.artifact_read import read_manifest
from tests.runtime.replicas import STEPS, config, micro_batches


def main(artifact: str, runs: str, out: str) -> None:
    logger.setLevel(logging.ERROR)
    half = "bf16" in {spec.dtype for spec in read_manifest(artifact).parameters}
    for number, run in enumerate(json.loads(Path(runs).read_text())):
        engine = autosp_aot.initialize(artifact, config(**run, bf16=half))
        losses = train(engine, run["accumulate"])
        tensors = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        if dist.get_rank() == 0:
            save_file({"losses": losses, **tensors}, Path(out, f"{number}.safetensors"))
        engine.destroy()


def train(engine, accumulate: int) -> torch.Tensor:
    """The mean loss of every step over micro-batches and replicas."""
    mesh = engine.mpu.mesh
    feed = iter(micro_batches(STEPS * accumulate * mesh.replicas))
    losses = torch.zeros(STEPS, dtype=torch.float64)
    for step in range(STEPS):
        for _ in range(accumulate):
            batch = [next(feed) for _ in range(mesh.replicas)][mesh.replica]
            loss = engine(**batch)
            engine.backward(loss)
            engine.step()
            losses[step] += loss.detach() / accumulate
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


if __name__ == "__main__":
    main(*sys.argv[1:])
