"""Complex values are pairs of reals, whatever a model does with them: loss and gradients are eager's on all ranks."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from autosp_aot.commands.build.builder import build
from autosp_aot.errors import BuildError
from tests import architectures
from tests.architectures import SMALL, Architecture, Case, outcomes
from tests.steps import captured, equal_to_eager, gathers, half_labelled

VOCABULARY, HIDDEN, HEADS = 64, 24, 3
WIDTH, LENGTH = HIDDEN // HEADS, 13
ROTATIONS = {
    "product": lambda z, f, size: z * f,
    "einsum": lambda z, f, size: torch.einsum("bnsd,sd->bnsd", z, f),
    "conjugates": lambda z, f, size: z * f * f.conj() * f.conj() + 2 * z,
    "absolute values": lambda z, f, size: z * f * z.abs(),
    "a learned polar": lambda z, f, size: z * torch.polar(size, size * 2) * f,
    "of real and imaginary parts": lambda z, f, size: z * torch.complex(f.real, f.imag * size),
    "parts put together": lambda z, f, size: torch.cat([z[..., :1], z[..., 1:] / f[:, 1:]], -1) * 1j + z.mean(),
    "exponentials of angles": lambda z, f, size: z * torch.exp(1j * f.angle()),
    "sums with numbers and reals": lambda z, f, size: (z - f) * (1 + 2j) + 3.0 + z.roll(1, -1).flip(-1) - size,
    "a real and a complex one": lambda z, f, size: (size + z) * f - (size - f),
    "a matrix product": lambda z, f, size: z @ (f[: WIDTH // 2] * size),
    "a quotient of reals": lambda z, f, size: z / size + f / 2.0,
}


def table(length: int) -> Tensor:
    """e^(i m t) of positions m and frequencies t."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, WIDTH, 2).double() / WIDTH)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


class Model(nn.Module):
    """Attention whose queries and keys are turned by a table that is made in forward, or kept in some way."""

    def __init__(self, rotation: str = "product", kept: str = ""):
        super().__init__()
        self.rotation, self.kept = ROTATIONS[rotation], kept
        self.tokens, self.qkv, self.out = (
            nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        )  # fmt: skip
        self.size = nn.Parameter(torch.rand(WIDTH // 2) + 0.5)
        if kept == "attribute":
            self.table = table(64)
        elif kept:
            self.register_buffer("table", table(64), persistent=kept == "persistent buffer")

    def turned(self, x: Tensor, f: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(self.rotation(z, f, self.size)).flatten(-2).type_as(x)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        length = input_ids.shape[1]
        f, x = self.table[:length] if self.kept else table(length), self.tokens(input_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.turned(q, f), self.turned(k, f), v, is_causal=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return F.cross_entropy((x @ self.tokens.weight.t()).flatten(0, 1), labels.flatten())


def made(*args) -> Model:
    torch.manual_seed(0)
    model = Model(*args).double()
    if model.kept:
        model.table = table(64)
    return model


@pytest.mark.parametrize(("rotation", "kept"), [
    *((rotation, "") for rotation in ROTATIONS),
    *(("product", kept) for kept in ("attribute", "buffer", "persistent buffer")),
])  # fmt: skip
def test_every_rank_is_exact_and_gathers_no_table(rotation, kept):
    model, batch = made(rotation, kept), half_labelled(LENGTH)
    step = captured(model, batch)
    for ranks in (1, 2, 5):
        compiled = equal_to_eager(model, batch, ranks, step=step)
        assert compiled.fallbacks == () and gathers(compiled.program, LENGTH * WIDTH) == []


@pytest.mark.parametrize("kept", ["", "attribute", "buffer", "persistent buffer"])
def test_artifacts_hold_and_train_with_tables_as_pairs(kept, tmp_path):
    build(made("product", kept), half_labelled(LENGTH), 2, tmp_path / "a", target="cpu")  # compares steps with eager


def test_an_operator_without_a_rule_is_refused_with_its_line():
    class Sines(Model):
        def turned(self, x, f):
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()).sin()).flatten(-2)

    with pytest.raises(BuildError) as caught:
        captured(Sines().double(), half_labelled(LENGTH))
    assert str(caught.value) == (
        "error[complex-operator]: aten.sin.default is called with complex values\n"
        f"  where  test_complex.py:{Sines.turned.__code__.co_firstlineno + 1}\n"
        "  why    complex values are pairs of reals here, for which it has no rule\n"
        "  fix    write it with real numbers, or with products, sums and views of complex ones"
    )


def test_parts_that_are_written_into_are_refused():
    class Written(Model):
        def turned(self, x, f):
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * f
            torch.view_as_real(z)[..., 0].mul_(2)
            return torch.view_as_real(z).flatten(-2)

    with pytest.raises(BuildError) as caught:
        captured(Written().double(), half_labelled(LENGTH))
    assert str(caught.value) == (
        "error[complex-operator]: aten.mul_.Tensor writes into the parts of a complex value\n"
        f"  where  test_complex.py:{Written.turned.__code__.co_firstlineno + 2}\n"
        "  why    complex values are pairs of reals here, and their parts put together are a copy\n"
        "  fix    compute new parts, and make a complex value of them with view_as_complex"
    )


def test_gradients_at_zero_are_zero_and_autocast_leaves_products_alone():
    class Zeros(Model):
        def turned(self, x, f):
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            empty = z - z
            with torch.autocast("cpu", torch.bfloat16):
                z = z @ f[: WIDTH // 2]
            return torch.view_as_real(z + empty.abs() + empty.angle() + z.sum(dtype=torch.complex128)).flatten(-2)

    torch.manual_seed(0)
    model, batch = Zeros().double(), half_labelled(LENGTH)
    for ranks in (1, 3):
        equal_to_eager(model, batch, ranks)


STOCK = {
    "llama4": Architecture(
        hf.Llama4ForCausalLM, hf.Llama4TextConfig,
        SMALL | {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
                 "attention_chunk_size": 8, "interleave_moe_layer_step": 2},
    ),
    "deepseek_v2": Architecture(
        hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config,
        {name: value for name, value in SMALL.items() if name != "head_dim"} | {
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("mask", ["none", "right", "packed"])
def test_stock_models_are_exact(name, mask, monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, name, STOCK[name])
    tried = [Case(name, mask, "half", 33, ranks) for ranks in (2, 3)]
    assert [(case, error, fallbacks) for case, error, fallbacks in outcomes(tried) if error > 1e-6 or fallbacks] == []
