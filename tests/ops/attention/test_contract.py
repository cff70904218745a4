"""Kernels and what they are given: against torch's meta kernels, and against one that reads memory as CUDA's does."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from autosp_aot.ops.attention import kernels
from autosp_aot.ops.attention.arguments import KernelCall, Saved
from autosp_aot.ops.table import ALL, OURS
from autosp_aot.targets.flash import CUDA_FLASH, Flash
from autosp_aot.targets.table import CPU, CUDA, ROCM, TARGETS
from tests.sharding import attention_cases, routing_cases
from tests.storages import to_meta

HALF = (torch.bfloat16, torch.float16)


def in_some_memory(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same elements: dims in any order, perhaps a slice of more, perhaps one that begins at an odd place."""
    order = rng.sample(range(tensor.dim()), tensor.dim())
    kept = tensor.permute(order)
    if rng.random() < 0.5:
        wide = kept.new_zeros((*kept.shape[:-1], kept.shape[-1] + 8))
        start = rng.choice((0, 1, 8))
        wide[..., start : start + kept.shape[-1]] = kept
        kept = wide[..., start : start + kept.shape[-1]]
    else:
        kept = kept.contiguous()
    return kept.permute([order.index(dim) for dim in range(tensor.dim())])


@dataclass
class Case:
    """A plain call over heads, or over an interval of heads and rows, and what its backward is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    causal: bool
    tail: tuple[int, ...]

    @property
    def by_rows(self) -> bool:
        return len(self.tail) == 3

    @property
    def scoring(self) -> dict:
        return {"scale": 0.3, "causal": self.causal}

    def forward(self, target: str) -> tuple[Tensor, Tensor]:
        return self.called("attention", target, self.q, self.k, self.v)

    def backward(self, target: str, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return self.called("attention_backward", target, self.grad_out, self.q, self.k, self.v, out, lse, None)

    def called(self, name: str, target: str, *tensors) -> tuple[Tensor, ...]:
        op, args = self.arguments(name, target, *tensors)
        return OURS[op].kernel(*args, **self.scoring)

    def arguments(self, name: str, target: str, *tensors) -> tuple[str, tuple]:
        op = f"autosp.{name.replace('attention', 'attention_rows') if self.by_rows else name}"
        return op, OURS[op].laid_out((*tensors, [], None, *self.tail), self.scoring, target)

    def to(self, place: Callable[[Tensor], Tensor]) -> "Case":
        return replace(self, **{name: place(getattr(self, name)) for name in ("q", "k", "v", "grad_out")})


def drawn(seed: int, dtype: torch.dtype = torch.float64, width: int | None = None) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv, group, rows = rng.randint(1, 2), rng.randint(1, 3), rng.choice((1, 1, 2, 3)), rng.randint(1, 9)
    width, heads = width or rng.choice((1, 3, 8)), kv * group
    make = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)  # noqa: E731
    q, k, v, grad_out = (make(batch, n, rows, width) for n in (heads, kv, kv, heads))
    tail: tuple[int, ...] = (group, 0)
    if rng.random() < 0.3:
        start = rng.randrange(heads * rows)
        stop = rng.randint(start + 1, heads * rows)
        q, grad_out = (t.flatten(1, 2)[:, start:stop] for t in (q, grad_out))
        served = slice(start // rows // group, (stop - 1) // rows // group + 1)
        k, v, tail = k[:, served], v[:, served], (group, rows, start)
    laid = [in_some_memory(rng, t) for t in (q, k, v, grad_out)]
    return Case(*laid, rng.random() < 0.5, tail)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def meta_is(monkeypatch):
    """Tensors without data stand for those of a device: torch has its kernels' layouts."""
    return lambda target: monkeypatch.setitem(TARGETS, "meta", target)


def strides(tensors) -> list[tuple]:
    """Of dims of more than one place."""
    return [
        (t.dtype, tuple(t.shape), [step for size, step in zip(t.shape, t.stride()) if size > 1])
        for t in ([tensors] if isinstance(tensors, Tensor) else tensors)
    ]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_results_lie_as_torch_s_meta_kernels_of_cuda_make_them(meta_is, seed, dtype):
    meta_is(CUDA)
    case = drawn(seed, dtype, width=8).to(to_meta)
    out, lse = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in (
        (case.q.shape, dtype), (case.q.shape[:-1], torch.float32)
    ))  # fmt: skip
    given = {
        "attention": (case.q, case.k, case.v),
        "attention_backward": (case.grad_out, case.q, case.k, case.v, out, lse, None),
    }
    for name, tensors in given.items():
        op, args = case.arguments(name, "cuda", *tensors)
        made = OURS[op].traced(*args, **case.scoring)
        assert strides(made) == strides(OURS[op].workspace(*args, target="cuda", **case.scoring)[0])


@pytest.mark.parametrize("op", [op.name for op in ALL if op.name not in ("autosp.rescale", "autosp.uniform")])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_so_do_those_of_every_operator_of_our_own(meta_is, op, seed, dtype):
    meta_is(CUDA)
    if op in attention_cases.ARGUMENTS:
        *args, scoring = attention_cases.ARGUMENTS[op](random.Random(seed))
    else:
        args, scoring = routing_cases.ARGUMENTS[op](random.Random(seed)), {}
    place = lambda t: to_meta(t.to(dtype) if t.is_floating_point() else t) if isinstance(t, Tensor) else t  # noqa: E731
    args = [tuple(map(place, arg)) if isinstance(arg, tuple) else place(arg) for arg in args]
    names = list(OURS[op].arguments)
    for name in {"lse", "grad_lse"} & set(names):  # fp32 beside half dtypes
        lse = args[names.index(name)]
        args[names.index(name)] = lse if lse is None or dtype not in HALF else to_meta(torch.empty(lse.shape))
    args = OURS[op].laid_out(args, scoring, "cuda")
    made = (OURS[op].traced or OURS[op].kernel)(*args, **scoring)
    assert strides(made) == strides(OURS[op].workspace(*args, target="cuda", **scoring)[0])


# --- a kernel that reads memory as CUDA's does ------------------------------------------------------------------------


@dataclass
class CudaFlash:
    """`mha_fwd` and `mha_bwd` of flash_api.cpp, as far as they go about memory; numbers by softmax of all scores.

    `peak_bytes` are those that it makes beside its results.
    """

    peak_bytes: list[int] = field(default_factory=list)

    def forward(self, call: KernelCall) -> tuple[Tensor, Tensor]:
        q, k, v = map(self.read, (call.q, call.k, call.v))
        scores = self.scores(call, q, k)
        out = torch.empty_like(call.q).copy_(scores.softmax(-1) @ v)
        self.peak_bytes.append(0)
        return out, scores.logsumexp(-1)

    def backward(self, call: KernelCall, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        copied = [t for t in (saved.grad_out, saved.out) if not t.transpose(1, 2).is_contiguous()]
        (batch, heads, rows, width), padded = call.q.shape, -(-call.q.shape[2] // 128) * 128
        dq_accum = batch * heads * padded * (-(-width // 32) * 32 if width <= 128 else -(-width // 64) * 64)
        self.peak_bytes.append(sum(t.numel() * t.itemsize for t in copied) + (dq_accum + batch * heads * padded) * 4)
        q, k, v = map(self.read, (call.q, call.k, call.v))
        lse = saved.lse.as_strided((batch, heads, rows), (heads * rows, rows, 1))  # whatever its strides
        weights = torch.exp(self.scores(call, q, k) - lse.unsqueeze(-1))
        grad_weights = saved.grad_out @ v.transpose(-1, -2)
        delta = (saved.grad_out * saved.out).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - delta) * call.scoring.scale
        found = grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ saved.grad_out
        return tuple(torch.empty_like(like).copy_(t) for like, t in zip((call.q, call.k, call.v), found))

    def read(self, tensor: Tensor) -> Tensor:
        """Rows are loaded 16 bytes at a time, one element after the other, whatever the stride of the last dim."""
        starts = [step for size, step in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
        starts.append(tensor.storage_offset())
        assert not any(start * tensor.itemsize % 16 for start in starts), "misaligned address"
        room = tensor.untyped_storage().nbytes() // tensor.itemsize
        places = sum((size - 1) * step for size, step in zip(tensor.shape, (*tensor.stride()[:-1], 1)))
        assert tensor.storage_offset() + places < room, "illegal memory access"
        return tensor.as_strided(tensor.shape, (*tensor.stride()[:-1], 1), tensor.storage_offset())

    def scores(self, call: KernelCall, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * call.scoring.scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf) if call.scoring.causal else scores


@pytest.fixture
def cpu_is_cuda(monkeypatch):
    """CPU's tensors go to that kernel, by the contract of CUDA's, but in fp64; returns the kernel."""

    def set_up(flash: Flash = CUDA_FLASH) -> CudaFlash:
        kernel = CudaFlash()
        monkeypatch.setattr(kernels, "_cpu_flash", kernel.forward)
        monkeypatch.setattr(kernels, "_cpu_flash_backward", kernel.backward)
        monkeypatch.setitem(TARGETS, "cpu", replace(CPU, flash=replace(flash, dtypes=("f64",))))
        return kernel

    return set_up


def gap(case: Case, target: str = "cpu") -> float:
    """How far forward and backward are from the softmax of all scores, differentiated by autograd."""
    found = case.forward(target)
    found = (*found, *case.backward(target, *found))
    leaves = [t.detach().clone().double().requires_grad_() for t in (case.q, case.k, case.v)]
    q, k, v = leaves
    group = case.tail[0]
    if case.by_rows:
        rows, start = case.tail[1:]
        at = torch.arange(start, start + q.shape[1])
        kv, hidden = at // rows // group - start // rows // group, torch.arange(k.shape[2]) > (at % rows)[:, None]
        scores = torch.einsum("bld,bltd->blt", q, k[:, kv]) * 0.3
        scores = scores.masked_fill(hidden, -torch.inf) if case.causal else scores
        out = torch.einsum("blt,bltd->bld", scores.softmax(-1), v[:, kv])
    else:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * 0.3
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf) if case.causal else scores
        out = scores.softmax(-1) @ v
    expected = out, scores.logsumexp(-1), *torch.autograd.grad(out, leaves, case.grad_out.double())
    return max(float((a - b).norm() / b.norm().clamp_min(1)) for a, b in zip(found, expected))


def beyond_plan(case: Case, kernel: CudaFlash) -> int:
    """Bytes that backward takes more than its workspace says, beside what is not its kernel's."""
    out, lse = case.forward("cpu")
    op, args = case.arguments("attention_backward", "cpu", case.grad_out, case.q, case.k, case.v, out, lse, None)
    kernel.peak_bytes.clear()
    OURS[op].kernel(*args, **case.scoring)
    return max(kernel.peak_bytes) - OURS[op].workspace(*args, target="cpu", **case.scoring)[1]


@pytest.mark.parametrize("seed", range(60))
def test_cpu_reads_any_memory_right(seed):
    assert gap(drawn(seed)) <= 1e-12


@pytest.mark.parametrize("seed", range(60))
def test_so_does_a_kernel_that_reads_memory_as_cuda_s(cpu_is_cuda, seed):
    kernel = cpu_is_cuda()
    case = drawn(seed, width=8)
    assert gap(case) <= 1e-12
    assert beyond_plan(case, kernel) <= 0


MUTANTS = {
    "stride": {"dense": ()},
    "alignment": {"alignment_bytes": 8},
    "lse layout": {"dense_lse": False, "lse_by_row": True},
    "copies": {"copied": ()},
    "accumulation": {"accumulates": False},
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_a_contract_without_a_demand_is_seen(cpu_is_cuda, change):
    kernel = cpu_is_cuda(replace(CUDA_FLASH, **change))

    def fails(case: Case) -> bool:
        try:
            return not gap(case) <= 1e-12 or beyond_plan(case, kernel) > 0
        except AssertionError:
            return True

    assert any(fails(drawn(seed, width=8)) for seed in range(60))


@pytest.mark.parametrize("target", ["cuda", "rocm"])
@pytest.mark.parametrize("width, rounded", [(8, 32), (64, 64), (128, 128), (136, 192), (256, 256)])
def test_workspace_of_backward_is_grad_q_in_fp32_of_rounded_rows_and_widths(target, width, rounded):
    q = torch.empty(2, 300, 3, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    lse = torch.empty(2, 3, 300, device="meta")
    args = q, q, q, q, q, lse, None, [], None, 1, 0
    planned = OURS["autosp.attention_backward"].workspace(*args, target=target, scale=1.0)[1]
    assert planned == 2 * 3 * 384 * (rounded + 1) * 4


def splits(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """`num_splits_heuristic` of flash_api.cpp: the fewest parts with 85 % of the best use of all multiprocessors."""
    if blocks >= 0.8 * multiprocessors:
        return 1
    counts = range(1, min(128, multiprocessors, key_blocks) + 1)
    each = lambda count: -(-key_blocks // count)  # noqa: E731
    counts = [count for count in counts if count == 1 or each(count) != each(count - 1)]
    use = {count: (blocks * count / multiprocessors) / -(-blocks * count // multiprocessors) for count in counts}
    return next(count for count in counts if use[count] >= 0.85 * max(use.values()))


def test_the_parts_of_forward_s_keys_fit_their_workspace():
    for rows in (1, 64, 500, 1000, 4000, 9000, 16000, 17000):
        q = torch.empty(1, rows, 1, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        planned = OURS["autosp.attention"].workspace(q, q, q, [], None, 1, 0, target="cuda", scale=1.0)[1]
        for multiprocessors in range(40, 161, 4):
            parts = splits(-(-rows // 64), 2 * multiprocessors, -(-rows // 256))
            assert (parts * rows * 65 * 4 if parts > 1 else 0) <= planned
    assert planned == 0


def test_rocm_makes_no_parts_and_lays_grad_v_out_as_k():
    q = torch.empty(2, 3, 8, 16, dtype=torch.bfloat16, device="meta")
    k, lse = q.transpose(1, 2).contiguous().transpose(1, 2), torch.empty(2, 3, 8, device="meta")
    out = k
    args = out, q, k, q, out, lse, None, [], None, 1, 0
    made = {
        target.name: OURS["autosp.attention_backward"].workspace(*args, target=target.name, scale=1.0)[0][2]
        for target in (CUDA, ROCM)
    }
    assert (made["cuda"].stride(), made["rocm"].stride()) == (q.stride(), k.stride())
    assert OURS["autosp.attention"].workspace(q, k, q, [], None, 1, 0, target="rocm", scale=1.0)[1] == 0
