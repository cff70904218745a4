"""One rank of DeepSpeed engines in loops of other kinds; started by test_engine_loops.py.

    python deepspeed_loops.py ARTIFACT DS.json BATCH.safetensors

Prints {"drawn": losses of forwards before one step, "means": parameters of a step on means, "sums": sums}.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

import autosp_aot


def main(artifact: str, config: str, batch: str) -> None:
    said, given = json.loads(Path(config).read_text()), load_file(batch)
    engine = autosp_aot.initialize(artifact, said)
    found = {"drawn": [float(engine(**given).detach()) for _ in range(3)]}
    engine.destroy()
    for name, op in (("means", "mean"), ("sums", "sum")):
        engine = autosp_aot.initialize(artifact, said | {"gradient_allreduce_op": op})
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(**given))
            engine.step()
        found[name] = engine.module.table.weight.detach().flatten().tolist()
        engine.destroy()
    print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
