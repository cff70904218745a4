"""Models as people train them: under autocast, with frozen parameters, with gradient checkpointing."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

from autosp_aot.errors import BuildError
from examples import plain
from tests.architectures import GPT2, SMALL
from tests.eager import difference, eager
from tests.steps import sharded, worst

BATCH = {name: torch.arange(26).reshape(2, 13) * 7 % 61 for name in ("input_ids", "labels")}


def decoder(dtype: str = "float64") -> nn.Module:
    torch.manual_seed(0)
    return plain.build_model(64, 32, 2, 4, 2, 64, dtype=dtype)


# --- autocast -----------------------------------------------------------------------------------------------------


class Autocast(nn.Module):
    """A model in a region of bf16."""

    def __init__(self, model: nn.Module, enabled: bool = True):
        super().__init__()
        self.model, self.enabled = model, enabled

    def forward(self, input_ids, labels):
        with torch.autocast("cpu", torch.bfloat16, self.enabled):
            result = self.model(input_ids=input_ids, labels=labels)
        return result if isinstance(result, torch.Tensor) else result.loss


@pytest.mark.parametrize("make", [
    lambda: decoder("float32"),
    lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL)),
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, attn_implementation="eager")),
    lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_local_experts=4)),
], ids=["plain", "qwen2", "llama spelled out", "mixtral"])  # fmt: skip
def test_autocast_is_as_near_to_fp32_as_eager_autocast(make):
    torch.manual_seed(0)
    model = make().train()
    reference = eager(Autocast(model, False), BATCH)
    own = difference(reference, *eager(Autocast(model), BATCH))
    compiled, results = sharded(Autocast(model), BATCH, 3)
    assert not compiled.fallbacks
    assert 0 < worst(reference, results) <= 2 * own


# --- frozen parameters --------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen linear layer and a trained product beside it (LoRA, arXiv:2106.09685)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, linear.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(linear.out_features, 2, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b)


def frozen_embedding(model):
    model.tokens.requires_grad_(False)


def frozen_layer(model):
    for part in (model.tokens, model.positions, model.blocks[0]):
        part.requires_grad_(False)


def frozen_bias(model):
    model.blocks[1].up.bias.requires_grad_(False)


def low_rank(model):
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.down = LowRank(block.qkv), LowRank(block.down)


@pytest.mark.parametrize("freeze", [frozen_embedding, frozen_layer, frozen_bias, low_rank])
def test_only_what_trains_has_gradients_and_they_are_eager_s(freeze):
    model = decoder()
    freeze(model)
    compiled, results = sharded(model, BATCH, 3)
    trained = {f"grad.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not compiled.fallbacks and all(set(result) == {"loss", *trained} for result in results)
    assert worst(eager(model, BATCH), results) <= 1e-12


def test_a_model_in_which_nothing_trains_is_refused():
    model = decoder().requires_grad_(False)
    with pytest.raises(BuildError) as caught:
        sharded(model, BATCH, 2)
    assert str(caught.value) == (
        "error[nothing-trains]: no parameter gets a gradient\n"
        f"  where  plain.py:{plain.Decoder.forward.__code__.co_firstlineno}\n"
        "  why    there is nothing for a step to train\n"
        "  fix    set requires_grad of what is to be trained"
    )


# --- gradient checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
], ids=["llama", "gpt2"])  # fmt: skip
def test_stock_gradient_checkpointing_is_eager_s(make):
    torch.manual_seed(0)
    model = make().double().train()
    model.gradient_checkpointing_enable()
    compiled, results = sharded(model, BATCH, 3)
    assert not compiled.fallbacks
    assert worst(eager(model, BATCH), results) <= 1e-6


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = decoder()

    def forward(self, input_ids, labels):
        x = self.model.tokens(input_ids)
        x = checkpoint(self.model.blocks[0], x, use_reentrant=True)
        return F.cross_entropy(self.model.head(x).flatten(0, 1), labels.flatten())


def test_the_reentrant_kind_is_refused_with_its_line():
    line = Reentrant.forward.__code__.co_firstlineno + 2
    with pytest.raises(BuildError, match=rf"(?s)reentrant-checkpoint.*where  test_training_modes\.py:{line}\n"):
        sharded(Reentrant(), BATCH, 2)


def test_stock_reentrant_checkpointing_is_refused():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(BuildError, match=r"(?s)reentrant-checkpoint.*where  modeling_layers\.py:\d+\n"):
        sharded(model, BATCH, 2)
