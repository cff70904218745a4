"""An artifact as a DeepSpeed engine, from the DeepSpeed config that people have.

    artifact, ds.json  ->  check one against the other  ->  the rank's program as a module  ->  deepspeed.initialize

                        DeepSpeed                                    the program
    forward, backward   engine(**batch), engine.backward(loss)       all of it; gradients are left as partial sums
    reduction           one, over dp x sp ranks: sum / dp            none
    ZeRO, optimizer     its own                                      -

DeepSpeed adds up gradients over sequence x data parallel ranks and divides by the data parallel size, as its Ulysses
does, which is what partial sums need.
"""

import json
from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils.data import Dataset

from autosp_aot.artifact.read import read_manifest
from autosp_aot.runtime.comm import Mesh
from autosp_aot.runtime.module import ShardedModel
from autosp_aot.runtime.proved import require_digest
from autosp_aot.training.deepspeed.config import check_samples, checked_config, read_config
from autosp_aot.training.label_count import is_items
from autosp_aot.training.load_alike import load_alike

FURTHER = 2**40  # more than there are micro-batches


def initialize(
    artifact: str | Path,
    config: dict | str | Path,
    *,
    init_from: str | Path | None = None,
    digest: str | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    lr_scheduler: Callable[[Optimizer], object] | None = None,
    training_data: Dataset | None = None,
    collate_fn: Callable[[list], dict[str, Tensor]] | None = None,
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine that trains with an artifact: `loss = engine(**batch); engine.backward(loss); engine.step()`.

    `config` is DeepSpeed's, a dict or a JSON file. What it says of sequence parallelism, dtype and batch size has to be
    the artifact's, and what would not be applied to a program is refused; "auto" is filled in where the artifact knows.
    `init_from` and `digest` are as for `load`; `optimizer` and `lr_scheduler` are DeepSpeed's, as functions;
    `training_data`, put together by `collate_fn`, becomes `engine.training_dataloader`, which gives the ranks that
    share a sequence the same samples.

    DeepSpeed averages over micro-batches and replicas. Where forward takes `num_items_in_batch`, give the number of
    labels that count in all of them together; the loss is then multiplied by their number: the average is the sum.

    The ranks are those of torchrun or of deepspeed's launcher, dp x sp of them in any multiple of the artifact's sp.
    Where the config has no communication_data_type, gradients are added up in fp32. Raises ArtifactError.
    """
    with Mesh.told():
        manifest = read_manifest(artifact)
        digest = require_digest(Path(artifact), digest)
        said = config if isinstance(config, dict) else read_config(Path(config))
    facts = {"artifact": digest, "config": json.dumps(said, sort_keys=True, default=str)}
    mesh = Mesh.join(manifest.target, manifest.ranks, alone=False, facts=facts)
    applied = checked_config(said, manifest, mesh.replicas)
    if isinstance(training_data, Sized):
        check_samples(len(training_data), applied, mesh.replicas)
    module = load_alike(Path(artifact), init_from, mesh, digest)
    return engine_of(
        module, applied, mesh, optimizer=optimizer, lr_scheduler=lr_scheduler, training_data=training_data,
        collate_fn=collate_fn,
    )  # fmt: skip


def engine_of(module: ShardedModel, config: dict, mesh: Mesh, **given: object) -> deepspeed.DeepSpeedEngine:
    """The engine over a module that leaves partial sums of gradients; `config` is checked, the rest is DeepSpeed's."""
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=[p for p in module.parameters() if p.requires_grad], config=config,
        mpu=Places(mesh), **given,
    )  # fmt: skip
    _undo_first_step(engine.optimizer)
    factor = _factor(engine)
    engine.register_forward_pre_hook(Preparation(factor))
    module.register_forward_hook(lambda module, args, loss: loss * factor if module.training else loss)
    return engine


class Preparation:
    """Before each forward: what the loss will be multiplied by, for gradients computed with it, and what it draws.

    A micro-batch draws by its number. DeepSpeed counts them as it steps: of several forwards between two of its steps,
    each further one in training mode draws by a number of its own, far from all numbers of micro-batches.
    """

    def __init__(self, factor: int):
        self.factor, self.number, self.further = factor, -1, 0

    def __call__(self, engine: deepspeed.DeepSpeedEngine, args: tuple) -> None:
        module, mesh, accumulate = engine.module, engine.mpu.mesh, engine.gradient_accumulation_steps()
        scale = engine._get_optimizer_loss_scale() or 1.0
        number = engine.global_steps * accumulate + engine.micro_steps % accumulate  # checkpoints have global_steps
        if module.training:
            self.further = self.further + 1 if number == self.number else 0
            self.number = number
        drawn = self.further * FURTHER + number * mesh.replicas + mesh.replica
        module.step_state = replace(module.step_state, number=drawn, loss_scale=scale * self.factor / accumulate)


class Driven:
    """A DeepSpeed engine for the loop of `run`. DeepSpeed's own `step` comes after each micro-batch and counts."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.engine, self.factor = engine, _factor(engine)

    def accumulate(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.engine(**batch)
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        return loss.detach() / self.factor

    def step(self) -> tuple[float, float]:
        (lr, *_), norm = self.engine.get_lr(), self._norm()
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm), lr

    def _norm(self) -> Tensor | None:
        """The norm of all gradients where DeepSpeed, without an optimizer of its own, does not say it."""
        if isinstance(self.engine.optimizer, DeepSpeedOptimizer):
            return None
        return get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])


class Places:
    """A rank's groups by the names that DeepSpeed asks Megatron's `mpu` for."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        sp, rank = mesh.sequence.size, mesh.world.rank
        self.alone = dist.new_group([rank], use_local_synchronization=True)
        self.sequence = self.alone if sp == 1 else mesh.sequence.process_group or dist.group.WORLD
        self.columns = [list(range(first, mesh.world.size, sp)) for first in range(sp)]
        self.data = dist.group.WORLD if sp == 1 else [dist.new_group(ranks) for ranks in self.columns][rank % sp]

    def get_model_parallel_group(self):
        return self.alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.columns[self.mesh.sequence.rank]

    def get_data_parallel_rank(self) -> int:
        return self.mesh.replica

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.replicas

    def get_sequence_parallel_group(self):
        return self.sequence

    def get_sequence_parallel_rank(self) -> int:
        return self.mesh.sequence.rank

    def get_sequence_parallel_world_size(self) -> int:
        return self.mesh.sequence.size

    def get_sequence_data_parallel_group(self):
        return dist.group.WORLD

    def get_sequence_data_parallel_rank(self) -> int:
        return self.mesh.world.rank

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.mesh.world.size


def _undo_first_step(optimizer: Optimizer | DeepSpeedOptimizer) -> None:
    """Masters and state as before a step was taken.

    For half parameters without ZeRO, DeepSpeed makes optimizer state by a step on zero gradients, which decays weights
    and counts as the first of Adam's bias correction.
    """
    if not isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        return
    fused = isinstance(optimizer, FP16_Optimizer)
    masters = [optimizer.fp32_groups_flat] if fused else optimizer.fp32_groups
    parameters = [optimizer.fp16_groups_flat] if fused else optimizer.fp16_groups
    for group, halves in zip(masters, parameters):
        for master, half in zip(group, halves):
            master.data.copy_(half)
    optimizer.optimizer.state.clear()


def _factor(engine: deepspeed.DeepSpeedEngine) -> int:
    """What makes an average over a step's micro-batches the sum, where each is divided by the labels of all of them.

    With `gradient_allreduce_op: sum` DeepSpeed averages over a replica's own micro-batches only.
    """
    if not any(map(is_items, engine.module.manifest.batch)):
        return 1
    return engine.gradient_accumulation_steps() * (engine.mpu.mesh.replicas if engine.gradient_average else 1)
