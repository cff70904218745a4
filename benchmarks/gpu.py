"""What runs on a device, measured on one: kernels against a reference, and a layer of an 8B model against its plan.

    python -m benchmarks.gpu               on a GPU: writes docs/gpu.md, with date and device
    python -m benchmarks.gpu --tiny        small sizes, on CPU where there is no GPU: prints, and writes nothing

kernels   each attention kernel and each own operator, in the dtypes, head dims and strides that programs give them: the
          difference from the same in fp64 (block by block, one operator after the other), and what was allocated beside
          operands against the workspace that plans have. Exit code 1 where either is beyond its limit.
layers    one layer of Llama-3.1-8B with embedding, head and loss, in bf16: sp 1, and rank 0 of sp 8 with what other
          ranks would send copied from what it would send itself. Time of a step, the best of three after one; peak of
          the allocator beside inputs, against the plan.
"""

import argparse
import datetime
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autosp_aot
from autosp_aot.artifact.write import Artifact
from autosp_aot.ir.operators import DTYPES, wide
from autosp_aot.ir.program import map_args
from autosp_aot.ir.structure.moves import in_order
from autosp_aot.ir.transfers import storage_bytes
from autosp_aot.ops.attention.arguments import KernelCall, Saved, Scoring
from autosp_aot.ops.attention.blockwise import blockwise, blockwise_backward
from autosp_aot.ops.table import OURS
from autosp_aot.runtime.comm import present_target
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.module import run
from tests.storages import to_meta

OUT = Path(__file__).parent.parent / "docs" / "gpu.md"
# Of the norm of a result: what rounding makes of it, with some room. Half dtypes round what they multiply.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROUNDED_BYTES = 512  # of each allocation, by CUDA's allocator
ORDERS = {"BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3), "BNDS": (0, 1, 3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, and no file")
    tiny = parser.parse_args().tiny
    target = present_target()
    device = torch.device("cpu" if target == "cpu" else "cuda")
    if device.type == "cpu" and not tiny:
        sys.exit("torch finds no GPU here: --tiny runs on CPU")
    name = "CPU" if target == "cpu" else torch.cuda.get_device_name()
    began = time.perf_counter()
    lines = [
        "# On a device\n",
        f"`python -m benchmarks.gpu{' --tiny' if tiny else ''}`: {name}, torch {torch.__version__}, "
        f"{datetime.date.today()}. {__doc__.partition('kernels   ')[0].partition(':')[0].lower()}.\n",
        "| kernel | calls | worst difference | limit | workspace / plan, at most |",
        "|---|---|---|---|---|",
    ]
    found = Kernels(device, target, 48 if tiny else 1024, (8, 64) if tiny else (64, 80, 128, 192, 256)).run()
    for what in dict.fromkeys(check.what for check in found):
        checks = [check for check in found if check.what == what]
        worst = f"{max(check.gap for check in checks):.1e} | {checks[0].limit:.0e}"
        kept = f"{max(check.share for check in checks):.2f}" if device.type == "cuda" else "-"
        lines.append(f"| {what} | {len(checks)} | {worst} | {kept} |")
        print(lines[-1], flush=True)
    lines += ["", "| layer | step | TFLOP/s | peak | planned |", "|---|---|---|---|---|"]
    for sp, seq in ((1, 256), (8, 256)) if tiny else ((1, 2**15), (8, 2**15), (1, 2**17), (8, 2**17)):
        lines.append(layer(device, target, sp, seq, tiny))
        print(lines[-1], flush=True)
    lines.append(f"\n{time.perf_counter() - began:.0f} s in all.")
    if not tiny:
        OUT.write_text("\n".join(lines) + "\n")
    wrong = [check for check in found if not check.gap <= check.limit or check.share > 1]
    print("\n".join(f"beyond its limit: {check}" for check in wrong) or lines[-1])
    sys.exit(bool(wrong))


@dataclass(frozen=True)
class Check:
    """A call of an operator: its worst difference from the reference, and what it took of its planned workspace."""

    what: str
    case: str
    gap: float
    limit: float
    share: float


# --- kernels ----------------------------------------------------------------------------------------------------------


@dataclass
class Kernels:
    """Operators of our own, called on a device; `checks` is what was found."""

    device: torch.device
    target: str
    rows: int
    widths: tuple[int, ...]

    def __post_init__(self):
        self.checks: list[Check] = []
        self.draw = torch.Generator().manual_seed(0)

    def run(self) -> list[Check]:
        for dtype in LIMITS:
            for by_rows in (False, True):
                for width, causal, group, order in itertools.product(self.widths, (True, False), (1, 4), ORDERS):
                    self.attention(dtype, width, causal, group, order, by_rows)
        for dtype in LIMITS:
            self.biased(dtype)
        for dtype in LIMITS:
            self.experts(dtype)
        for dtype in LIMITS:
            self.elementwise(dtype)
        return self.checks

    def call(self, op: str, case: str, args: tuple, scoring: dict, exact: list[Tensor]) -> list[Tensor]:
        """The results of a call, of operands laid out as the kernel demands; what they are is noted."""
        record = OURS[f"autosp.{op}"]
        placed = record.laid_out(args, scoring, self.device.type)
        results, taken = allocated(lambda: tensors(record.kernel(*placed, **scoring)), self.device)
        layouts = map_args(tuple(placed), lambda arg: to_meta(arg) if isinstance(arg, Tensor) else arg)
        made, workspace = record.workspace(*layouts, target=self.target, **scoring)
        planned = sum(storage_bytes(t) for t in made) + workspace
        dtype = next(t.dtype for t in results if t.dtype in LIMITS)
        share = max(taken - 12 * ROUNDED_BYTES, 0) / max(planned, 1)  # a dozen tensors are rounded up
        gap = max(map(difference, results, exact))
        self.checks.append(Check(f"{op}, {str(dtype).removeprefix('torch.')}", case, gap, LIMITS[dtype], share))
        return results

    def attention(self, dtype: torch.dtype, width: int, causal: bool, group: int, order: str, by_rows: bool) -> None:
        """4 query heads, or an interval of their rows, whose operands lie in memory as `order` says."""
        kv, scoring, rows = 4 // group, {"scale": width**-0.5, "causal": causal}, self.rows
        drawn = [self.normal(dtype, 2, n, rows, width) for n in (4, kv, kv, 4)]
        q, k, v, grad_out = (in_order(t, ORDERS[order]) for t in drawn)
        name, tail, own = "attention", (group, 0), slice(0, 4 * rows)
        if by_rows:
            own = slice(rows // 3, 4 * rows - 5)
            name, tail = "attention_rows", (group, rows, own.start)
        outside = torch.ones(4 * rows, dtype=torch.bool, device=self.device)
        outside[own] = False  # rows of another rank: what they add to gradients of k and v is not this one's
        grad_out = grad_out.masked_fill(outside.view(4, rows, 1), 0)
        exact = exact_attention(*(t.double() for t in (q, k, v, grad_out)), group, scoring)
        if by_rows:
            q, grad_out = (t.flatten(1, 2)[:, own] for t in (q, grad_out))
            exact[:3] = [t.flatten(1, 2)[:, own] for t in exact[:3]]
        case = f"D {width}, causal {causal}, group {group}, {order}"
        out, lse = self.call(name, case, (q, k, v, [], None, *tail), scoring, exact[:2])
        given = grad_out, q, k, v, out, lse, None, [], None, *tail
        self.call(f"{name}_backward", case, given, scoring, exact[2:])

    def biased(self, dtype: torch.dtype) -> None:
        """A learned bias on keys, which is done in blocks, and the gradient of the bias."""
        rows = self.rows // 4
        scoring = {"scale": 0.2, "causal": True, "score": ("aten.add.Tensor", "s", "v0")}
        whole = [self.normal(dtype, 2, 4, rows, 24) for _ in range(4)]
        bias = self.normal(dtype, 1, 4, 1, rows)
        for name, tail in (("attention", (1, 0)), ("attention_rows", (1, rows, 0))):
            q, k, v, grad_out = (t.flatten(1, 2) if len(tail) == 3 and at % 3 == 0 else t for at, t in enumerate(whole))

            def steps(given: list[Tensor], call: Callable[[str, tuple], list[Tensor]]) -> None:
                *_, vector = given
                out, lse = call(name, (*given[:3], [vector], None, *tail))
                saved = given[3], *given[:3], out, lse, None, [vector], None
                call(f"{name}_backward", (*saved, *tail))
                call(f"{name}_vector_gradient", (*saved, 0, *tail))

            exact: dict[str, list[Tensor]] = {}
            given = [q, k, v, grad_out, bias]
            reference = lambda op, args: exact.setdefault(op, tensors(OURS[f"autosp.{op}"].kernel(*args, **scoring)))  # noqa: E731, B023
            steps([t.cpu().double() for t in given], reference)
            steps(given, lambda op, args: self.call(op, "a bias on keys", args, scoring, exact[op]))  # noqa: B023

    def experts(self, dtype: torch.dtype) -> None:
        """Products of rows with the expert that each is routed to, and the gradient of the experts' weights."""
        ids = torch.randint(-1, 5, (self.rows,), generator=self.draw).to(self.device)
        x, grad = self.normal(dtype, self.rows, 64), self.normal(dtype, self.rows, 96)
        weight = self.normal(dtype, 4, 64, 96)
        held = [(ids == expert).double().unsqueeze(1) for expert in range(4)]
        y = torch.stack([mask * (x.double() @ weight[expert].double()) for expert, mask in enumerate(held)]).sum(0)
        of_weight = torch.stack([(x.double() * mask).t() @ (grad.double() * mask) for mask in held])
        for lies in (weight, in_order(weight, (0, 2, 1))):
            self.call("expert_mm", "64 x 96, 4 experts", (ids, x, lies), {}, [y])
        self.call("expert_mm_weight_grad", "64 x 96, 4 experts", (ids, x, grad, 4), {}, [of_weight])

    def elementwise(self, dtype: torch.dtype) -> None:
        """Draws, the same bits as on CPU, of which a rank has the part of its box; and what is rescaled."""
        kernel, seed, shape, box = OURS["autosp.uniform"].kernel, torch.tensor(7), (4, self.rows), (1, 1, 5, self.rows)
        whole = kernel(seed, 3, shape, (), dtype=dtype, device=torch.device("cpu"))
        part = kernel(seed.to(self.device), 3, shape, box, dtype=dtype, device=self.device)
        gap = float(not torch.equal(part.cpu(), whole[:, box[2] : box[3]]))
        self.checks.append(Check(f"uniform, {str(dtype).removeprefix('torch.')}", "a box of columns", gap, 0.0, 0.0))
        x, tangent, guess = self.normal(dtype, self.rows, 64), *torch.tensor([3.0, 2.0]).to(self.device, dtype)
        self.call("rescale", "3 / 2", (x, tangent, guess), {}, [x.double() * 1.5])

    def normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.device, dtype)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, group: int, scoring: dict) -> list[Tensor]:
    """Out, lse and gradients of q, k and v in fp64, block by block."""
    call = KernelCall(q, *(t.repeat_interleave(group, 1) for t in (k, v)), [], Scoring(**scoring))
    out, lse = blockwise(call)
    grad_q, *grads = blockwise_backward(call, Saved(grad_out, out, lse, None))
    return [out, lse, grad_q, *(t.unflatten(1, (-1, group)).sum(2) for t in grads)]


def allocated(work: Callable[[], list[Tensor]], device: torch.device) -> tuple[list[Tensor], int]:
    """What `work` returns, and the most bytes that were allocated meanwhile; 0 on CPU, whose allocator does not say."""
    with torch.no_grad():
        work()  # what libraries keep for themselves is there
        if device.type == "cpu":
            return work(), 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = work()
        torch.cuda.synchronize()
        return results, torch.cuda.max_memory_allocated() - before


def difference(found: Tensor, exact: Tensor) -> float:
    """Of the norm."""
    return float((found.double() - exact.to(found.device)).norm() / exact.norm().clamp_min(1e-30))


def tensors(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


# --- layers -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Embedding, one layer, norm, head and loss of a Llama."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, hidden // heads
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.norms = nn.ParameterList(torch.ones(hidden) for _ in range(3))
        self.q, self.o = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(inner, hidden, bias=False), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        y = F.rms_norm(x, x.shape[-1:], self.norms[0])
        q, k, v = (
            part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (self.q(y), self.k(y), self.v(y))
        )
        at = torch.arange(x.shape[1], device=x.device).unsqueeze(1)
        angle = at * 500000.0 ** -(torch.arange(0, self.width, 2, device=x.device) / self.width)
        turned = [torch.cat([part.cos() if even else part.sin() for part in (angle, angle)], -1) for even in (1, 0)]
        q, k = (t * turned[0].to(t.dtype) + half_turned(t) * turned[1].to(t.dtype) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        y = F.rms_norm(x, x.shape[-1:], self.norms[1])
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        logits = self.head(F.rms_norm(x, x.shape[-1:], self.norms[2]))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def half_turned(t: Tensor) -> Tensor:
    a, b = t.chunk(2, -1)
    return torch.cat([-b, a], -1)


@dataclass(frozen=True)
class Alone:
    """Rank 0 of `size`, who is sent what it would send itself."""

    size: int
    rank: int = 0

    def exchange(self, buffer: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        received = buffer.new_empty(sum(receive_sizes))
        for start in range(0, received.numel(), max(buffer.numel(), 1)):
            part = received[start : start + buffer.numel()]
            part.copy_(buffer[: part.numel()])
        return received

    def sum(self, buffer: Tensor) -> Tensor:
        return buffer


def layer(device: torch.device, target: str, sp: int, seq: int, tiny: bool) -> str:
    """A row of the table: rank 0's step."""
    sizes = (64, 8, 2, 96, 512) if tiny else (4096, 32, 8, 14336, 128256)
    with torch.device("meta"):
        model = Layer(*sizes).to(torch.bfloat16)
    tokens = torch.zeros(1, seq, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens}
    artifact = autosp_aot.build(model, batch, sp, target=target, weights=False, eager_check=False, evaluation=False)
    executor = Executor(artifact.program.for_rank(0), 0, device)
    inputs = values(artifact, device, sizes[-1])
    seconds = []
    peak = 0
    for _ in range(4):
        held, before = dict(inputs), memory(device)
        began = time.perf_counter()
        with torch.no_grad():
            for section in artifact.program.sections:
                run(executor, section.name, held, Alone(sp))
        peak = max(peak, memory(device, peak=True) - before)
        seconds.append(time.perf_counter() - began)
        del held
    costs, best = artifact.manifest.step.costs, min(seconds[1:])
    gib = lambda count: f"{count / 2**30:.3f} GiB"  # noqa: E731
    taken = gib(peak) if device.type == "cuda" else "-"
    where = "sp 1" if sp == 1 else f"rank 0 of sp {sp}"
    rate = costs.flops / best / 1e12
    return f"| {seq} tokens, {where} | {best * 1e3:.1f} ms | {rate:.1f} | {taken} | {gib(costs.peak_bytes)} |"


def values(artifact: Artifact, device: torch.device, vocabulary: int) -> dict[str, Tensor]:
    """Made-up inputs of a program: small weights, tokens, a tangent of one."""
    found = {name: tensor.to(device) for name, tensor in artifact.buffers.items()}
    for entry in artifact.program.inputs:
        shape, dtype = entry.value.sizes, DTYPES[entry.value.dtype]
        if entry.kind == "parameter":
            found[entry.value.name] = torch.randn(shape, device=device, dtype=wide(dtype)).mul_(0.02).to(dtype)
        elif entry.kind == "batch":
            found[entry.value.name] = torch.randint(vocabulary, shape, device=device)
        elif entry.kind in ("tangent", "guess"):
            found[entry.value.name] = torch.ones(shape, device=device, dtype=dtype)
    return found


def memory(device: torch.device, peak: bool = False) -> int:
    """Bytes that are allocated, or the most since it was asked for last; 0 on CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    main()
