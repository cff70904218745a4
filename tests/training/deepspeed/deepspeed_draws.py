"""One rank that takes a step, saves a checkpoint of DeepSpeed and goes on from it; started by test_engine.py.

    python deepspeed_draws.py ARTIFACT DS.json BATCH.safetensors OUT

Prints {"losses": [...], "evaluated": ...}, of its micro-batches and of the batch in eval mode.
"""

import json
import sys

import torch.distributed as dist
from safetensors.torch import load_file

import autosp_aot


def main(artifact: str, config: str, batch: str, out: str) -> None:
    losses = []
    for step in range(2):
        engine = autosp_aot.initialize(artifact, config)
        engine.compile()  # as scripts for AutoSP do; a program is compiled already
        if step:
            engine.load_checkpoint(out)
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(**load_file(batch))
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        engine.save_checkpoint(out)
    engine.eval()
    print(json.dumps({"losses": losses, "evaluated": float(engine(**load_file(batch)))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.barrier()
    dist.destroy_process_group()
