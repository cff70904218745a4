"""The training loop of `run`: micro-batches of all replicas are a step, and a step is a line.

    step k, micro-batches a = 0 .. accumulate - 1 on replica r of dp:
      number = (k * accumulate + a) * dp + r     of the micro-batch; what it draws and its samples follow from it alone
      engine.accumulate(batch)                   loss, and gradients added to those before
    engine.step()                                one reduction over dp x sp, clipping, AdamW
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from autosp_aot.runtime.data import Feed
from autosp_aot.runtime.groups import Mesh
from autosp_aot.runtime.load import load
from autosp_aot.runtime.log import Log
from autosp_aot.runtime.module import ShardedModel
from autosp_aot.runtime.optimizer import AdamW
from autosp_aot.runtime.schedule import Schedule


@dataclass(frozen=True)
class Training:
    """What `run` is told, the batches apart.

    steps         how many to take
    dp            replicas: groups of ranks, each with sequences of its own
    accumulate    micro-batches of a replica in a step
    schedule      learning rates
    zero          1: optimizer state is shared out over all ranks
    clip          the greatest norm that all gradients may have together
    weight_decay  AdamW's
    init_from     safetensors file or folder instead of the stored weights
    metrics       JSON lines: step, loss, grad_norm, lr, tokens_per_s
    dump          write loss and gradients of the first step, and stop
    seed          of data and dropout
    """

    artifact: Path
    steps: int = 10
    dp: int = 1
    accumulate: int = 1
    schedule: Schedule = Schedule(1e-3)
    zero: int = 0
    clip: float | None = None
    weight_decay: float = 0.01
    init_from: Path | None = None
    metrics: Path | None = None
    dump: Path | None = None
    seed: int = 0


class Engine(Protocol):
    """Whoever adds up gradients and changes parameters: ours, or another's over the same module."""

    def accumulate(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a micro-batch, whose gradients are added to those since the last step."""

    def step(self) -> tuple[float, float]:
        """Change the parameters; the norm of all gradients before clipping, and the learning rate."""


class Plain:
    """An engine of torch alone. Gradients are those of the mean over a step's micro-batches, of all replicas."""

    def __init__(self, module: ShardedModel, training: Training, mesh: Mesh):
        self.module, self.training = module, training
        self.optimizer = AdamW(module.parameters(), mesh.world, training.zero, training.weight_decay)
        self.scale = 1 / (mesh.replicas * training.accumulate)
        self.taken = 0

    def accumulate(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.module(**batch)
        loss.backward()
        if self.training.accumulate > 1:
            self.optimizer.accumulate()
        return loss.detach()

    def step(self) -> tuple[float, float]:
        lr = self.training.schedule.at(self.taken)
        self.taken += 1
        return self.optimizer.step(lr, self.scale, self.training.clip), lr

    def gradients(self) -> dict[str, Tensor]:
        """Instead of a step: the gradients that it would take, before clipping, as `grad.NAME`, on the host."""
        found = self.optimizer.gradients(self.scale)
        return {f"grad.{name}": found[p].cpu() for name, p in self.module.named_parameters() if p in found}


@dataclass(frozen=True)
class Loop:
    """One rank's steps: `engine` runs `module` on the micro-batches of `feed` that are this replica's."""

    engine: Engine
    module: ShardedModel
    training: Training
    feed: Feed
    mesh: Mesh

    def run(self) -> None:
        """Take all steps; rank 0 writes a line a step.

        A loss that is not finite is said so, and training goes on, as a loop in eager torch would.
        """
        talking = self.mesh.world.rank == 0
        log = Log(self.training.steps, self.training.metrics) if talking else None
        for step in range(self.training.steps):
            started = time.perf_counter()
            loss, tokens = self.accumulate(step)
            norm, lr = self.engine.step()
            seconds = time.perf_counter() - started
            if log is not None:
                log.step(step + 1, loss, norm, lr, tokens / seconds)
        if log is not None:
            log.close()

    def accumulate(self, step: int) -> tuple[float, int]:
        """Accumulate a step's micro-batches; the mean of their losses over all replicas, and all their positions."""
        replicas, count = self.mesh.replicas, self.training.accumulate
        first = step * count * replicas + self.mesh.replica
        losses, tokens = [], 0
        for number in range(first, first + count * replicas, replicas):
            batch = {name: tensor.to(self.mesh.world.device) for name, tensor in self.feed.at(number).items()}
            self.module.step = number
            losses.append(self.engine.accumulate(batch))
            tokens += replicas * _tokens(batch)
        total = self.mesh.sum_replicas(torch.stack(losses).double().sum())
        return float(total) / (count * replicas), tokens


def train(training: Training, feed: Feed, mesh: Mesh) -> None:
    """Train as one rank of `mesh` with torch alone, or write the dump."""
    module = load(training.artifact, training.init_from, mesh.world.device, mesh.sequence, sum_gradients=False)
    module.seed = training.seed
    engine = Plain(module, training, mesh)
    loop = Loop(engine, module, training, feed, mesh)
    if training.dump is None:
        loop.run()
        return
    loss, _ = loop.accumulate(0)
    gradients = engine.gradients()
    if mesh.world.rank == 0:
        save_file({"loss": torch.tensor(loss, dtype=torch.float64), **gradients}, training.dump)


def _tokens(batch: dict[str, Tensor]) -> int:
    """Positions of a micro-batch: batch times sequence of the largest integer input, 0 without one."""
    return max((tensor.numel() for tensor in batch.values() if not tensor.is_floating_point()), default=0)
