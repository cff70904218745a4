"""The training loop of `run`: AdamW on every rank alike, a line a step."""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from autosp_aot.runtime.data import Feed
from autosp_aot.runtime.groups import Group
from autosp_aot.runtime.load import load


@dataclass(frozen=True)
class Training:
    """What `run` is told, the batches apart.

    steps       how many to take          init_from   safetensors file or folder instead of the stored weights
    lr          AdamW's learning rate     metrics     JSON lines: step, loss, grad_norm, lr, tokens_per_s
    seed        of data and dropout       dump        write loss and gradients of the first step, and stop
    """

    artifact: Path
    steps: int = 10
    lr: float = 1e-3
    init_from: Path | None = None
    metrics: Path | None = None
    dump: Path | None = None
    seed: int = 0


class AdamW:
    """torch's AdamW with torch's defaults (betas 0.9 and 0.999, eps 1e-8, weight decay 0.01), bit for bit.

    It calls the functional form: constructing `torch.optim.AdamW` imports torch.compile, 1.7 s for nothing used here.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        self.parameters, self.lr = parameters, lr
        self.averages = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.squares = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.steps = [torch.zeros(()) for _ in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient, and let its gradient go."""
        state = zip(self.parameters, self.averages, self.squares, self.steps)
        parameters, averages, squares, steps = zip(*(entry for entry in state if entry[0].grad is not None))
        adamw(
            list(parameters), [p.grad for p in parameters], list(averages), list(squares), [], list(steps),
            foreach=True, amsgrad=False, maximize=False,
            lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01,
        )  # fmt: skip
        for parameter in parameters:
            parameter.grad = None


def train(training: Training, feed: Feed, group: Group) -> None:
    """Train as one rank of `group`; rank 0 writes a line a step to stdout.

    A loss that is not finite is said so, and training goes on, as a loop in eager torch would.
    """
    module = load(training.artifact, training.init_from, group.device, group)
    module.seed = training.seed
    named = dict(module.named_parameters())
    optimizer = AdamW(list(named.values()), training.lr)
    talking = group.rank == 0
    metrics = training.metrics.open("w") if training.metrics and talking else None
    for step in range(training.steps):
        started = time.perf_counter()
        batch = {name: tensor.to(group.device) for name, tensor in feed.at(step).items()}
        module.step = step
        loss = module(**batch)
        loss.backward()
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        if training.dump is not None:
            if talking:
                _dump(training.dump, loss, gradients)
            return
        norm = float(get_total_norm(list(gradients.values())))
        optimizer.step()
        tokens_per_s = _tokens(batch) / (time.perf_counter() - started)
        if talking:
            _report(step, training, float(loss.detach()), norm, tokens_per_s, metrics)
    if metrics is not None:
        metrics.close()


def _dump(path: Path, loss: Tensor, gradients: dict[str, Tensor]) -> None:
    tensors = {"loss": loss.detach(), **{f"grad.{name}": grad for name, grad in gradients.items()}}
    save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)


def _tokens(batch: dict[str, Tensor]) -> int:
    """Positions a step trains on: batch times sequence of the largest integer input, 0 without one."""
    return max((tensor.numel() for tensor in batch.values() if not tensor.is_floating_point()), default=0)


def _report(step: int, training: Training, loss: float, norm: float, tokens_per_s: float, metrics) -> None:
    remark = "" if math.isfinite(loss) else "  (not finite)"
    _progress(None, training.steps)
    line = f"step {step + 1:<5} loss {loss:<9.5f} grad_norm {norm:<9.4f} tokens/s {tokens_per_s:.0f}{remark}"
    print(line, flush=True)
    _progress(step + 1, training.steps)
    if metrics is not None:
        row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": training.lr, "tokens_per_s": tokens_per_s}
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        print(json.dumps(finite), file=metrics, flush=True)


def _progress(done: int | None, steps: int) -> None:
    """Draw the bar on stderr where that is a terminal; None wipes it away, as the last step does."""
    if not sys.stderr.isatty():
        return
    filled = 0 if done is None else 30 * done // steps
    bar = "" if done in (None, steps) else f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{steps}"
    print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)
