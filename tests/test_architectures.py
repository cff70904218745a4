"""Stock architectures that nothing in the compiler knows by name, loss and every gradient against eager."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autosp_aot.builder import model_values
from autosp_aot.config import BuildConfig
from autosp_aot.export.canonical import canonical_program
from autosp_aot.export.fake import fake_copy
from autosp_aot.export.joint import capture
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.runtime.simulate import simulate
from examples import llama
from tests.exactness import difference, eager

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_cache=False, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    use_cache=False, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
)  # fmt: skip
MODELS = {
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL, resid_pdrop=0.0, embd_pdrop=0.0)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL)),
}


def sharded(model: nn.Module, batch: dict, ranks: int) -> tuple[list[dict], tuple]:
    """Every rank's results, and the operators that fell back."""
    mode = FakeTensorMode()
    whole, constants = canonical_program(capture(fake_copy(model, mode), batch, mode, "cpu"))
    compiled = compile_program(whole, dict.fromkeys(batch, 1), BuildConfig(ranks))
    inputs = model_values(model) | dict(model.named_buffers()) | constants | batch
    grad_loss = torch.ones((), dtype=DTYPES[whole.values()["grad_loss"].dtype])
    programs = [compiled.program.for_rank(rank) for rank in range(ranks)]
    return simulate(programs, inputs, grad_loss), compiled.fallbacks


def worst(reference, results: list[dict]) -> float:
    """The worst difference of any rank's loss and gradients, in fp32 or wider."""
    wide = lambda t: t.float() if t.dtype is torch.bfloat16 else t  # noqa: E731
    return max(
        difference(reference, wide(r["loss"]), {n.removeprefix("grad."): wide(g) for n, g in r.items() if n != "loss"})
        for r in results
    )


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 64, (2, 13), generator=draw) for _ in range(2))
    labels[0, :6] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_loss_and_gradients_equal_eager_s(name, batch):
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    results, fallbacks = sharded(model, batch, 3)
    assert not fallbacks
    assert worst(eager(model, batch), results) <= 1e-6


def test_bf16_is_as_near_to_fp32_as_eager_bf16(batch):
    torch.manual_seed(0)
    model = llama.build_model("bfloat16", vocab_size=64, hidden_size=64, num_attention_heads=8, head_dim=8)
    wide = llama.build_model("float32", vocab_size=64, hidden_size=64, num_attention_heads=8, head_dim=8)
    wide.load_state_dict(model.state_dict())
    reference = eager(wide, batch)
    loss, gradients = eager(model, batch)
    results, _ = sharded(model, batch, 3)
    own = difference(reference, loss.float(), {n: g.float() for n, g in gradients.items()})
    assert 0 < worst(reference, results) <= 2 * own
