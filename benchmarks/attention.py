"""Attention block by block against causal flash attention, forward and backward, on one CPU core.

    python -m benchmarks.attention [--seq 4096]

4 heads of 64, fp32. Each figure is a ratio within a round, the best of five rounds.
"""

import argparse
import time
from collections.abc import Callable

import torch

from autosp_aot.ops.table import OURS

INF = float("inf")
CAUSAL = ("aten.le.Tensor", "k", "q")
SEGMENTS = ("aten.where.ScalarOther", ("aten.__and__.Tensor", CAUSAL, ("aten.eq.Tensor", "v0", "v1")), "s", -INF)
CAPPED = ("aten.mul.Tensor", ("aten.tanh.default", ("aten.div.Tensor", "s", 50.0)), 50.0)
SOFTCAP = ("aten.where.ScalarOther", CAUSAL, CAPPED, -INF)
ALIBI = ("aten.add.Tensor", "s", ("aten.mul.Tensor", "v0", ("aten.sub.Tensor", "k", "q")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seq", type=int, default=4096)
    seq = parser.parse_args().seq
    torch.set_num_threads(1)
    at = torch.arange(seq) // max(seq // 8, 1)
    documents = [at.view(1, 1, -1, 1), at.view(1, 1, 1, -1)]
    slopes = [torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)]
    cases = {
        f"window of {seq // 8}": ([], dict(causal=True, window=seq // 8)),
        "8 packed documents": (documents, dict(causal=True, score=SEGMENTS)),
        "softcap, causal": ([], dict(causal=True, score=SOFTCAP)),
        "ALiBi, causal": (slopes, dict(causal=True, score=ALIBI)),
    }
    flash, calls = call(seq, [], causal=True), {name: call(seq, *case[:1], **case[1]) for name, case in cases.items()}
    best = {name: (INF, INF) for name in calls}
    for _ in range(5):
        base = flash()
        for name, run in calls.items():
            ratios = [mine / its for mine, its in zip(run(), base)]
            best[name] = tuple(map(min, best[name], ratios))
    for name, (forward, backward) in best.items():
        print(f"{name:24} forward {forward:5.2f}   backward {backward:5.2f}   of causal flash attention")


def call(seq: int, vectors: list[torch.Tensor], **scoring) -> Callable[[], tuple[float, float]]:
    """A function that attends once; its seconds forward and backward."""
    q, k, v, grad = (torch.randn(1, seq, 4, 64).transpose(1, 2) for _ in range(4))

    def run() -> tuple[float, float]:
        began = time.perf_counter()
        out, lse = OURS["autosp.attention"].kernel(q, k, v, vectors, None, 1, 0, scale=0.125, **scoring)
        middle = time.perf_counter()
        saved = grad, q, k, v, out, lse, None, vectors, None
        OURS["autosp.attention_backward"].kernel(*saved, 1, 0, scale=0.125, **scoring)
        return middle - began, time.perf_counter() - middle

    return run


if __name__ == "__main__":
    main()
