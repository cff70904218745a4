"""One rank that goes on from DeepSpeed's checkpoint with another artifact; started by test_engine_checkpoints.py.

    python deepspeed_resume.py MICRO_BATCHES OUT ARTIFACT...        each takes an equal part of the steps

Writes OUT/<ZeRO stage>.safetensors: the losses of all steps and the parameters at the end.
"""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from safetensors.torch import save_file

import autosp_aot
from autosp_aot.artifact.read import read_manifest
from tests.training.deepspeed.deepspeed_runs import train
from tests.training.deepspeed.replicas import STEPS, config


def main(micro_batches: str, out: str, *artifacts: str) -> None:
    logger.setLevel(logging.ERROR)
    part = STEPS // len(artifacts)
    for zero in (0, 1, 2):
        losses, saved = [], Path(out, f"zero{zero}")
        for leg, artifact in enumerate(artifacts):
            ranks = read_manifest(artifact).ranks
            accumulate = int(micro_batches) * ranks // int(os.environ["WORLD_SIZE"])
            engine = autosp_aot.initialize(artifact, config(zero, accumulate, clip=0.3))
            if leg:
                engine.load_checkpoint(saved)
            losses.append(train(engine, accumulate, range(leg * part, (leg + 1) * part)))
            engine.save_checkpoint(saved)
            tensors = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
            engine.destroy()
        if dist.get_rank() == 0:
            save_file({"losses": torch.cat(losses), **tensors}, Path(out, f"{zero}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.barrier()
    dist.destroy_process_group()
