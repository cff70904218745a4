"""The training loop of `run`: micro-batches of all replicas are a step, and a step is a line.

    step k, micro-batches a = 0 .. accumulate - 1 on replica r of dp:
      number = (k * accumulate + a) * dp + r     of the micro-batch; what it draws and its samples follow from it alone
      engine.accumulate(batch)                   loss, and gradients added to those before
    engine.step()                                one reduction over dp x sp, clipping, AdamW
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from autosp_aot.runtime.comm import Mesh
from autosp_aot.runtime.module import ShardedModel, StepState
from autosp_aot.training.data import Feed
from autosp_aot.training.label_count import Items, open_items
from autosp_aot.training.learning_rate import Schedule
from autosp_aot.training.load_alike import load_alike
from autosp_aot.training.log import Log
from autosp_aot.training.optimizer import AdamW


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
    digest        of the artifact that is meant; None: whichever is there
    init_from     safetensors file or folder instead of the stored weights
    eval_every    steps from one evaluation to the next; None: no evaluation
    eval_batches  how many batches an evaluation is the mean of, shared out over replicas
    save          folder for the weights at the end
    metrics       JSON lines: step, loss, grad_norm, lr, tokens_per_s
    dump          write loss and gradients of the first step, and stop
    seed          of data and dropout
    deepspeed     a DeepSpeed config, checked against the artifact: its optimizer instead of ours
    """

    artifact: Path
    steps: int = 10
    dp: int = 1
    accumulate: int = 1
    schedule: Schedule = Schedule(1e-3)
    zero: int = 0
    clip: float | None = None
    weight_decay: float = 0.01
    digest: str | None = None
    init_from: Path | None = None
    eval_every: int | None = None
    eval_batches: int = 8
    save: Path | None = None
    metrics: Path | None = None
    dump: Path | None = None
    seed: int = 0
    deepspeed: dict | None = None


class Engine(Protocol):
    """Whoever adds up gradients and changes parameters: ours, or another's over the same module."""

    def accumulate(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a micro-batch, whose gradients are added to those since the last step."""

    def step(self) -> tuple[float, float]:
        """Change the parameters; the norm of all gradients before clipping, and the learning rate."""


class Plain:
    """An engine of torch alone. A step's gradient is `scale` times the sum of those of all replicas' micro-batches."""

    def __init__(self, module: ShardedModel, training: Training, mesh: Mesh, scale: float):
        self.module, self.training, self.scale = module, training, scale
        self.optimizer = AdamW(module.parameters(), mesh.world, training.zero, training.weight_decay)
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
    """One rank's steps: `engine` runs `module` on the micro-batches of `feed` that are this replica's.

    The loss of a step is the mean over all micro-batches; with `items`, the sum of what is divided by their labels.
    """

    engine: Engine
    module: ShardedModel
    training: Training
    feed: Feed
    held_out: Feed | None
    items: Items | None
    mesh: Mesh

    def run(self) -> None:
        """Take all steps; rank 0 writes a line a step.

        A loss that is not finite is reported, and training goes on, as a loop in eager torch would.
        """
        log = Log(self.training.steps, self.training.metrics) if self.mesh.world.rank == 0 else None
        for step in range(self.training.steps):
            started = time.perf_counter()
            loss, tokens = self.accumulate(step)
            norm, lr = self.engine.step()
            seconds = time.perf_counter() - started
            if log is not None:
                log.step(step + 1, loss, norm, lr, tokens / seconds)
            if self.training.eval_every is not None and (step + 1) % self.training.eval_every == 0:
                loss = self.evaluate()
                if log is not None:
                    log.evaluation(step + 1, loss)
        if log is not None:
            log.close()

    def accumulate(self, step: int) -> tuple[float, int]:
        """Accumulate a step's micro-batches; their loss, and how many positions all replicas trained on."""
        replicas, count = self.mesh.replicas, self.training.accumulate
        first = step * count * replicas + self.mesh.replica
        batches = {n: self.feed.at(n) for n in range(first, first + count * replicas, replicas)}
        losses = []
        for number, batch in zip(batches, self.given(list(batches.values()))):
            self.module.step_state = replace(self.module.step_state, number=number)
            losses.append(self.engine.accumulate(batch))
        tokens = replicas * sum(map(_tokens, batches.values()))
        total = float(self.mesh.sum_replicas(torch.stack(losses).double().sum()))
        return total * scale_of(self.items, replicas * count), tokens

    def evaluate(self) -> float:
        """The loss of the first held-out batches, in eval mode: the same batches each time, whatever the replicas."""
        assert self.held_out is not None, "there is something to evaluate on"
        count = self.training.eval_batches
        batches = {n: self.held_out.at(n) for n in range(self.mesh.replica, count, self.mesh.replicas)}
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.world.device)
        for number, batch in zip(batches, self.given(list(batches.values()))):
            self.module.step_state = replace(self.module.step_state, number=number)
            total += self.module.evaluate(**batch)
        return float(self.mesh.sum_replicas(total)) * scale_of(self.items, count)

    def given(self, batches: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The batches as forward takes them: on the device, with the labels of all replicas' batches counted."""
        device = self.mesh.world.device
        if self.items is not None:
            own = sum(map(self.items.count, batches), torch.tensor(0))
            count = self.mesh.sum_replicas(own.to(device))
            batches = [self.items.filled(batch, count) for batch in batches]
        return ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)


def train(training: Training, feed: Feed, mesh: Mesh, held_out: Feed | None = None) -> ShardedModel:
    """Train as one rank of `mesh` and save the weights, or write the dump; what was trained.

    `held_out` is what is evaluated on, needed for `eval_every`.
    """
    module = load_alike(training.artifact, training.init_from, mesh, training.digest)
    module.step_state = StepState(training.seed)
    items = open_items(training.artifact, module.manifest)
    engine = _engine(module, training, mesh, scale_of(items, mesh.replicas * training.accumulate))
    loop = Loop(engine, module, training, feed, held_out, items, mesh)
    if training.dump is not None:
        assert isinstance(engine, Plain), "DeepSpeed's gradients are its own"
        _dump(training.dump, loop, engine)
        return module
    loop.run()
    if training.save is not None and mesh.world.rank == 0:
        module.save_pretrained(training.save)
    return module


def _engine(module: ShardedModel, training: Training, mesh: Mesh, scale: float) -> Engine:
    if training.deepspeed is None:
        return Plain(module, training, mesh, scale)
    from autosp_aot.training.deepspeed.engine import (  # DeepSpeed is an extra, and takes a second to import
        Driven,
        engine_of,
    )

    return Driven(engine_of(module, training.deepspeed, mesh))


def scale_of(items: Items | None, count: int) -> float:
    """What the sum over `count` micro-batches is multiplied by: a mean, but where labels were counted for all."""
    return 1.0 if items is not None else 1 / count


def _dump(path: Path, loop: Loop, engine: Plain) -> None:
    loss, _ = loop.accumulate(0)
    gradients = engine.gradients()
    if loop.mesh.world.rank == 0:
        save_file({"loss": torch.tensor(loss, dtype=torch.float64), **gradients}, path)


def _tokens(batch: dict[str, Tensor]) -> int:
    """Positions of a micro-batch: batch times sequence of the largest integer input, 0 without one."""
    return max((tensor.numel() for tensor in batch.values() if not tensor.is_floating_point()), default=0)
