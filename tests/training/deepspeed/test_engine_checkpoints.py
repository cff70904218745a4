"""DeepSpeed's own checkpoints of an engine: training goes on from them, with other ranks too."""

from pathlib import Path

from safetensors.torch import load_file

import autosp_aot
from tests.processes import run_ranks
from tests.training.deepspeed.replicas import error, micro_batches, model, reference

RESUME = Path(__file__).with_name("deepspeed_resume.py")
MICRO_BATCHES = 4


def test_training_goes_on_with_ranks_shared_out_otherwise(tmp_path):
    """4 replicas, 2 that share sequences in pairs, 1 of 4 ranks, 4 again: five steps each, as one run of 20."""
    artifacts = [tmp_path / f"tiny.sp{sp}" for sp in (1, 2, 4)]
    for path in artifacts:
        autosp_aot.build(model(), micro_batches(1)[0], int(path.suffix[3:]), path, target="cpu")
    run_ranks(4, RESUME, MICRO_BATCHES, tmp_path, *artifacts, artifacts[0])
    expected = reference(MICRO_BATCHES, 0.3)
    for zero in (0, 1, 2):
        assert error(load_file(tmp_path / f"{zero}.safetensors"), expected) < 1e-5, zero
