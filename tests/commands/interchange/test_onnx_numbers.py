"""All ranks' ONNX files together in ONNX's own evaluator: loss and every gradient are eager's."""

import pytest

from autosp_aot.commands.interchange.onnx_file import onnx_model
from tests.architectures import ARCHITECTURES, Case
from tests.commands.interchange.reference import evaluate
from tests.eager import eager
from tests.steps import built, worst

CASES = [
    Case("llama", "none", "half", 13, 1),
    Case("llama", "right", "half", 13, 3, tile=3),
    Case("llama", "packed", "half", 13, 2, offload="host"),
    Case("gpt2", "none", "all", 13, 2),
    Case("bert", "left", "half", 13, 3),
    Case("convbert", "none", "all", 13, 2),
    Case("deberta_v2", "none", "all", 13, 2),
    Case("gpt_oss", "none", "all", 13, 2),
    Case("mamba2", "none", "half", 13, 3),
    Case("mixtral", "none", "half", 13, 3, recompute="none"),
    Case("mixtral, auxiliary loss", "none", "half", 13, 2, tile=2),
    Case("t5", "right", "half", 13, 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.ranks}-{case.tile}-{case.offload}")
def test_loss_and_gradients_are_eager_s(case, manifest):
    architecture, batch = ARCHITECTURES[case.name], case.batch()
    options = {"recompute": case.recompute, "tile": case.tile, "offload": case.offload}
    compiled, inputs = built(architecture.build(), batch, case.ranks, **options)
    models = [onnx_model(compiled.program.for_rank(rank), manifest, rank) for rank in range(case.ranks)]
    reference = architecture.build()
    reference.config._experts_implementation = "eager"
    assert worst(eager(reference, batch), evaluate(models, inputs)) <= architecture.limit
