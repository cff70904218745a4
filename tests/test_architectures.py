"""Stock architectures that nothing in the compiler knows by name, loss and every gradient against eager."""

import pytest
import torch

from examples import llama
from tests.architectures import ARCHITECTURES, outcomes, pairwise, steps
from tests.eager import difference, eager
from tests.steps import half_labelled, sharded, worst


@pytest.fixture
def batch():
    return half_labelled(13)


@pytest.mark.parametrize("alike", steps(pairwise()), ids=lambda alike: "-".join(map(str, alike[0].step)))
def test_loss_and_gradients_equal_eager_s(alike):
    found = list(outcomes(alike))
    assert [case for case, error, _ in found if not error <= ARCHITECTURES[case.name].limit] == []
    assert [case for case, _, fallbacks in found if fallbacks] == []


def test_bf16_is_as_near_to_fp32_as_eager_bf16(batch):
    torch.manual_seed(0)
    model = llama.build_model("bfloat16", vocab_size=64, hidden_size=64, num_attention_heads=8, head_dim=8)
    wide = llama.build_model("float32", vocab_size=64, hidden_size=64, num_attention_heads=8, head_dim=8)
    wide.load_state_dict(model.state_dict())
    reference = eager(wide, batch)
    loss, gradients = eager(model, batch)
    _, results = sharded(model, batch, 3)
    own = difference(reference, loss.float(), {n: g.float() for n, g in gradients.items()})
    assert 0 < worst(reference, results) <= 2 * own
