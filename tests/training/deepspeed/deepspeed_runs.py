"""One rank of real DeepSpeed engines, one after the other; started by test_engine.py.

    python deepspeed_runs.py RUNS.json OUT        {"artifact": "tiny.sp2", "zero": 1, "accumulate": 3, "clip": 0.3}, ...

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
from autosp_aot.artifact.read import read_manifest
from autosp_aot.training.label_count import is_items
from tests.training.deepspeed.replicas import STEPS, config, steps


def main(runs: str, out: str) -> None:
    logger.setLevel(logging.ERROR)
    for number, run in enumerate(json.loads(Path(runs).read_text())):
        artifact = run.pop("artifact")
        half = "bf16" in {spec.dtype for spec in read_manifest(artifact).parameters}
        engine = autosp_aot.initialize(artifact, config(**run, bf16=half))
        losses = train(engine, run["accumulate"])
        tensors = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        if dist.get_rank() == 0:
            save_file({"losses": losses, **tensors}, Path(out, f"{number}.safetensors"))
        engine.destroy()


def train(engine, accumulate: int, taken: range = range(STEPS)) -> torch.Tensor:
    """The mean loss of every step that is taken, over micro-batches and replicas."""
    mesh, items = engine.mpu.mesh, any(map(is_items, engine.module.manifest.batch))
    all_steps = steps(accumulate * mesh.replicas, items)
    losses = torch.zeros(len(taken), dtype=torch.float64)
    for at, step in enumerate(taken):
        for batch in all_steps[step][mesh.replica :: mesh.replicas]:
            loss = engine(**batch)
            engine.backward(loss)
            engine.step()
            losses[at] += loss.detach() / accumulate
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.barrier()
    dist.destroy_process_group()
