"""Complex values are pairs of reals, whatever a model does with them: loss and gradients are eager's on all ranks."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from autosp_aot.commands.build.builder import build
from autosp_aot.errors import BuildError
from tests import architectures
from tests.architectures import SMALL, Architecture, Case, outcomes
from tests.export import mend
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


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


class Sines(Model):
    def turned(self, x, f):
        return torch.view_as_real(pairs(x).sin()).flatten(-2)  # here


class PartsWritten(Model):
    def turned(self, x, f):
        z = pairs(x) * f
        torch.view_as_real(z)[..., 0].mul_(2)  # here
        return torch.view_as_real(z).flatten(-2)


class OneOfTheParts(Model):
    def turned(self, x, f):
        f = f * 1
        torch.view_as_real(f).unbind(-1)[1].mul_(2)  # here
        return torch.view_as_real(pairs(x) * f).flatten(-2)


class ImaginaryPart(Model):
    def turned(self, x, f):
        z = pairs(x) * f
        conjugate = z.conj()
        z.imag.mul_(2)  # here
        return torch.view_as_real(conjugate.resolve_conj()).flatten(-2)


class BelowTheConjugate(Model):
    def turned(self, x, f):
        x = x * 1
        conjugate = torch.view_as_complex(x.unflatten(-1, (-1, 2))).conj()
        x.mul_(2)  # here
        return torch.view_as_real(conjugate.resolve_conj()).flatten(-2)


RULE = (
    "complex values are pairs of reals here, for which it has no rule",
    "write it with real numbers, or with products, sums and views of complex ones",
)
MEMORY = (
    "complex values are pairs of reals here, which may be copies of what is written",
    "compute new parts, and make a complex value of them with view_as_complex",
)


@pytest.mark.parametrize(("kind", "what", "why", "fix"), [
    (Sines, "aten.sin.default is called with complex values", *RULE),
    *((kind, "aten.mul_.Tensor writes into the memory of a complex value", *MEMORY)
      for kind in (PartsWritten, OneOfTheParts, ImaginaryPart, BelowTheConjugate)),
])  # fmt: skip
def test_what_is_not_known_to_be_exact_is_refused_with_its_line(kind, what, why, fix):
    lines, first = inspect.getsourcelines(kind)
    here = first + next(at for at, line in enumerate(lines) if line.endswith("# here\n"))
    with pytest.raises(BuildError) as caught:
        captured(kind().double(), half_labelled(LENGTH))
    assert str(caught.value) == (
        f"error[complex-operator]: {what}\n  where  test_complex.py:{here}\n  why    {why}\n  fix    {fix}"
    )


class RealSines(mend.Model):
    """What the fix of a refusal says, as `mend.Model` has it."""

    def inner(self, x, labels):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a.sin() * b.cosh(), a.cos() * b.sinh()], -1).flatten(2)


class ComplexSines(mend.Model):
    def inner(self, x, labels):
        return torch.view_as_real(pairs(x).sin()).flatten(2)  # here


class WrittenParts(mend.Model):
    def inner(self, x, labels):
        z = pairs(x) * 1j
        torch.view_as_real(z)[..., 0].mul_(2)  # here
        return torch.view_as_real(z * z).flatten(2)


class NewParts(mend.Model):
    def inner(self, x, labels):
        a, b = torch.view_as_real(pairs(x) * 1j).unbind(-1)
        z = torch.view_as_complex(torch.stack([a * 2, b], -1))
        return torch.view_as_real(z * z).flatten(2)


@pytest.mark.parametrize(("fix", "refused", "mended"), [
    (RULE[1], ComplexSines, RealSines), (MEMORY[1], WrittenParts, NewParts),
])  # fmt: skip
def test_the_fix_builds(fix, refused, mended, capfd):
    mend.Mend("complex-operator", fix, refused, mended).holds(capfd)


def test_what_is_written_before_there_is_a_complex_value_is_exact():
    class Before(Model):
        def turned(self, x, f):
            x = x * 1
            x.mul_(2)
            return torch.view_as_real(pairs(x) * f).flatten(-2)

    torch.manual_seed(0)
    equal_to_eager(Before().double(), half_labelled(LENGTH), 2)


def test_gradients_at_zero_are_zero():
    class Zeros(Model):
        def turned(self, x, f):
            z = pairs(x)
            empty = z - z
            return torch.view_as_real(z + empty.abs() + empty.angle() + z.sum(dtype=torch.complex128)).flatten(-2)

    torch.manual_seed(0)
    model, batch = Zeros().double(), half_labelled(LENGTH)
    for ranks in (1, 3):
        equal_to_eager(model, batch, ranks)


def test_autocast_leaves_products_of_complex_values_alone():
    class Cast(Model):
        def turned(self, x, f):
            with torch.autocast("cpu", torch.bfloat16):
                return torch.view_as_real(pairs(x) @ f[: WIDTH // 2].to(torch.complex64)).flatten(-2)

    torch.manual_seed(0)
    equal_to_eager(Cast(), half_labelled(LENGTH), 2, 1e-5)


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
