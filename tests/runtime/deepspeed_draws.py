"""One rank of a DeepSpeed engine that takes one step; started by test_engine.py.

    python deepspeed_draws.py ARTIFACT DS.json BATCH.safetensors        prints {"losses": [...]} of its micro-batches
"""

import json
import sys

from safetensors.torch import load_file

import autosp_aot


def main(artifact: str, config: str, batch: str) -> None:
    engine, losses = autosp_aot.initialize(artifact, config), []
    engine.compile()  # as scripts for AutoSP do; a program is compiled already
    for _ in range(engine.gradient_accumulation_steps()):
        loss = engine(**load_file(batch))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    print(json.dumps({"losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
