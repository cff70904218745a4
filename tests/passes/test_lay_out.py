"""What lies in memory otherwise than a kernel reads it is copied by an instruction."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosp_aot.commands.build.builder import build
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.text import parse_program, print_program
from autosp_aot.memory.costs import costs, curve
from autosp_aot.passes.lay_out import lay_out
from autosp_aot.runtime.load import load
from tests.steps import captured, equal_to_eager, half_labelled

BEFORE = """\
autosp program 1
ranks 1
batch %x: f32[1, 4, 2, 3] @ Replicate
section evaluate takes ()
  %q: f32[1, 2, 3, 4] @ Replicate = aten.permute.default(%x, [0, 2, 3, 1])
  %o: f32[1, 2, 3, 4] @ Replicate; %l: f32[1, 2, 3] @ Replicate = autosp.attention(%q, %q, %q, [], None, 1, 0, scale=0.5, causal=True)
  %p: f32[1, 2, 3, 4] @ Replicate; _ = autosp.attention(%q, %o, %q, [], None, 1, 0, scale=0.5, window=2, causal=True)
  %r: f32[1, 2, 3, 4] @ Replicate; _ = autosp.attention(%q, %o, %o, [], None, 1, 0, scale=0.5, causal=True)
gives ()
"""  # noqa: E501
AFTER = """\
autosp program 1
ranks 1
batch %x: f32[1, 4, 2, 3] @ Replicate
section evaluate takes ()
  %q: f32[1, 2, 3, 4] @ Replicate = aten.permute.default(%x, [0, 2, 3, 1])
  %q.relayout: f32[1, 2, 3, 4] @ Replicate = relayout(%q, [0, 2, 1, 3])
  %o: f32[1, 2, 3, 4] @ Replicate; %l: f32[1, 2, 3] @ Replicate = autosp.attention(%q.relayout, %q.relayout, %q.relayout, [], None, 1, 0, scale=0.5, causal=True)
  %p: f32[1, 2, 3, 4] @ Replicate; _ = autosp.attention(%q, %o, %q, [], None, 1, 0, scale=0.5, window=2, causal=True)
  %r: f32[1, 2, 3, 4] @ Replicate; _ = autosp.attention(%q.relayout, %o, %o, [], None, 1, 0, scale=0.5, causal=True)
gives ()
"""  # noqa: E501


def test_one_copy_serves_all_calls_of_a_section_and_what_is_done_in_blocks_needs_none():
    assert print_program(lay_out(parse_program(BEFORE, {}), "cpu"))[0] == AFTER


def test_what_lies_as_it_is_read_stays_as_it_is():
    program = parse_program(AFTER, {})
    assert lay_out(program, "cpu") == program


def test_copies_are_for_the_target_s_own_kernels():
    assert lay_out(parse_program(BEFORE, {}), "cuda") == parse_program(BEFORE, {})  # fp32 is done in blocks there
    half = BEFORE.replace("f32[1, 2, 3]", "lse").replace("f32", "bf16").replace("lse", "f32[1, 2, 3]")
    half = half.replace("[1, 2, 3, 4]", "[1, 2, 3, 8]").replace("[1, 4, 2, 3]", "[1, 8, 2, 3]")
    for target in ("cpu", "cuda", "rocm"):
        assert sum(instr.op == "relayout" for instr in lay_out(parse_program(half, {}), target).instrs()) == 1


def test_a_copy_is_counted():
    program = parse_program(AFTER, {})
    assert curve(program, 0, "cpu")[1].alive_bytes == program.values()["q.relayout"].nbytes()


def test_what_is_not_copied_is_refused():
    with pytest.raises(ArtifactError) as caught:
        costs(parse_program(BEFORE, {}), "cpu")
    assert str(caught.value) == (
        "error[program-illegal]: autosp.attention cannot be called like this\n"
        "  where  o, l = autosp.attention(...)\n"
        "  why    its operand 0 has strides [24, 3, 1, 6]: cpu/FlashAttentionKernel.cpp: cpublas::gemm(..., q_data + i"
        " * qStrideB + j * qStrideH + m * qStrideM, qStrideM, ...)\n"
        "  fix    build the artifact again"
    )


# --- any memory that a model's own code makes -------------------------------------------------------------------------

VOCABULARY, HIDDEN, ROWS = 64, 24, 13
# How a projection [B, S, H] makes heads [B, N, S, D]: by which product, and in which order of dims it lies.
LAYOUTS = ("BSND", "BSDN", "NDBS", "DNBS", "NBSD", "BSND in more", "BNDS")


def heads(kind: str, x: Tensor, weight: Tensor, count: int) -> Tensor:
    """x [B, S, H] @ weight [H, count * D] as [B, count, S, D], in the memory that `kind` says."""
    (batch, rows, _), width = x.shape, weight.shape[1] // count
    flat = x.flatten(0, 1)
    if kind == "BSND":
        return (flat @ weight).view(batch, rows, count, width).transpose(1, 2)
    if kind == "BSDN":
        return (flat @ weight).view(batch, rows, width, count).permute(0, 3, 1, 2)
    if kind == "NDBS":
        return (weight.t() @ flat.t()).view(count, width, batch, rows).permute(2, 0, 3, 1)
    if kind == "DNBS":
        return (weight.t() @ flat.t()).view(width, count, batch, rows).permute(2, 1, 3, 0)
    if kind == "NBSD":
        each = weight.view(-1, count, width).transpose(0, 1)
        return (flat.expand(count, -1, -1) @ each).view(count, batch, rows, width).transpose(0, 1)
    if kind == "BNDS":
        return F.conv1d(x.transpose(1, 2), weight.t().unsqueeze(-1)).unflatten(1, (count, width)).transpose(2, 3)
    more = (flat @ F.pad(weight, (3, 2))).view(batch, rows, -1)[..., 3:-2]
    return more.unflatten(-1, (count, width)).transpose(1, 2)


class Attending(nn.Module):
    """One attention whose q, k and v lie as drawn."""

    def __init__(self, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        number = lambda *of: of[int(torch.randint(len(of), (), generator=draw))]  # noqa: E731
        self.kv_heads, self.group, width = number(1, 2, 3), number(1, 2), number(1, 4, 6)
        self.kinds = [number(*LAYOUTS) for _ in range(3)]
        self.causal, query_heads = number(True, False), self.kv_heads * self.group
        self.tokens, self.out = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(query_heads * width, HIDDEN)
        sizes = (query_heads, self.kv_heads, self.kv_heads)
        self.weights = nn.ParameterList(torch.randn(HIDDEN, n * width, generator=draw) / 5 for n in sizes)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, counts = self.tokens(input_ids), (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        q, k, v = (heads(kind, x, w, n) for kind, w, n in zip(self.kinds, self.weights, counts))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.group > 1)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return F.cross_entropy((x @ self.tokens.weight.t()).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("seed", range(14))
def test_every_rank_is_exact_in_whatever_memory_heads_lie(seed):
    torch.manual_seed(seed)
    model, batch = Attending(seed).double(), half_labelled(ROWS)
    step = captured(model, batch)
    for ranks in (1, 2, 3, 4):
        equal_to_eager(model, batch, ranks, step=step)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("seed", range(3))
def test_so_it_is_in_narrower_dtypes(seed, dtype, limit):
    torch.manual_seed(seed)
    model, batch = Attending(seed).to(dtype), half_labelled(ROWS)
    step = captured(model, batch)
    for ranks in (1, 3):
        equal_to_eager(model, batch, ranks, limit, step=step)


# --- in tiles, and at the border --------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Experts whose weights lie so that torch's grouped product cannot read them."""

    def __init__(self):
        super().__init__()
        self.tokens, self.gate, self.head = nn.Embedding(64, 16), nn.Linear(16, 4), nn.Linear(16, 64)
        self.up, self.down = nn.Parameter(torch.randn(16, 24, 4) / 4), nn.Parameter(torch.randn(4, 24, 16) / 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids).flatten(0, 1)
        weights, experts = self.gate(x).softmax(-1).topk(2, -1)
        order = experts.flatten().argsort(stable=True)
        ends = torch.histc(experts.flatten()[order].float(), bins=4, min=0, max=3).cumsum(0).to(torch.int32)
        y = F.silu(F.grouped_mm(x[order // 2], self.up.permute(2, 0, 1).contiguous(), offs=ends))
        y = F.grouped_mm(y, self.down, offs=ends)[order.argsort()].view(-1, 2, 16)
        x = x + (y * weights.unsqueeze(-1)).sum(1)
        return F.cross_entropy(self.head(x).float(), labels.flatten())


def test_what_a_kernel_in_tiles_reads_is_copied_once_for_all_of_them():
    torch.manual_seed(0)
    model, batch = Mixture().bfloat16(), half_labelled(13)
    step = captured(model, batch)
    for ranks, options in ((1, {"tile": 2}), (3, {"tile": 3, "recompute": "full"})):
        compiled = equal_to_eager(model, batch, ranks, 6e-2, step=step, **options)
        outer = [instr.op for section in compiled.program.sections for instr in section.instrs]
        assert "tiles" in outer and outer.count("relayout") == 3
        assert sum(instr.op == "relayout" for instr in compiled.program.instrs()) == 3


class Remembering(nn.Module):
    """Keys that come with the batch."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, memory: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, memory, memory).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_a_batch_may_lie_in_any_memory(tmp_path):
    torch.manual_seed(0)
    model = Remembering()
    batch = half_labelled(13) | {"memory": torch.randn(2, 4, 13, 2).permute(0, 3, 2, 1)}
    dims = {"input_ids": 1, "labels": 1, "memory": 2}
    build(model, batch, 1, tmp_path / "a", sequence_dims=dims, target="cpu")
    loss = load(tmp_path / "a")(**batch)
    torch.testing.assert_close(loss, model(**batch))
