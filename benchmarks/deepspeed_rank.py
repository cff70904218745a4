"""One rank of benchmarks/deepspeed_start.py; imports no more than a training script has to.

    torchrun ... -m benchmarks.deepspeed_rank SAID CONFIG.json [ARTIFACT]        no artifact: an empty engine

Rank 0 writes to SAID when the first and the second step ended: seconds since 1970, and of processor since it began.
"""

import json
import sys
import time
from pathlib import Path

import deepspeed
import torch

import autosp_aot


def main(said: str, config: str, artifact: str | None = None) -> None:
    if artifact is None:
        engine, *_ = deepspeed.initialize(model=Empty(), config=config)
        batch = {"x": torch.ones(1, 8)}
    else:
        engine = autosp_aot.initialize(artifact, config)
        batch = {spec.name: torch.zeros(spec.shape, dtype=torch.int64) for spec in engine.module.manifest.batch}
    ends = []
    for _ in range(2):
        engine.backward(engine(**batch))
        engine.step()
        ends.append((time.time(), time.process_time()))
    if engine.global_rank == 0:
        Path(said).write_text(json.dumps(ends))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Empty(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).sum()


if __name__ == "__main__":
    main(*sys.argv[1:])
