"""A rank's program as a module: forward gives the loss, backward fills `.grad`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from autosp_aot.artifact.batches import constants_of, flat, tensors_of
from autosp_aot.artifact.manifest import Manifest, no_evaluation
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Program, Value
from autosp_aot.ir.structure.record import Exchange, Meeting
from autosp_aot.ops.random import step_seed
from autosp_aot.runtime.execute import Executor, SectionRun
from autosp_aot.runtime.same_batch import check_same_batch
from autosp_aot.runtime.weights_out import save_weights


class Comm(Protocol):
    """How a rank meets the others; buffers are 1-D."""

    @property
    def rank(self) -> int:
        """Which of the ranks this one is."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def exchange(self, buffer: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Send the parts of `buffer` to the ranks in order; what they sent, in order."""

    def sum(self, buffer: Tensor) -> Tensor:
        """The sum of `buffer` over all ranks."""


@dataclass(frozen=True)
class StepState:
    """What a step depends on beside weights and batch, the same on every rank.

    What the step draws (dropout) follows from `seed` and `number` alone, both i64. `loss_scale` is what the loss is
    multiplied by before `backward`: gradients computed with the loss take it as their tangent, and are rescaled, which
    rounds, where it was another.
    """

    seed: int = 0
    number: int = 0
    loss_scale: float = 1.0


class ShardedModel(nn.Module):
    """The model of an artifact on one of its ranks, with the original's parameter names.

    `forward(**batch)` takes the whole batch on every rank (shapes, dtypes as built) and returns the loss, the same on
    every rank; `backward` adds the gradients of the whole step to `.grad`, the same on every rank. Without
    `sum_gradients` what it adds are partial sums: summed over the ranks they are those gradients, of the same shapes.

    `step_state` is what a step depends on beside weights and batch: its number goes up by one with each forward in
    training mode. To resume before step k, set it to `StepState(seed, k)`.

    In eval mode forward is `evaluate`, whose loss has no gradient: there is one backward, and it is that of training.
    """

    path: Path
    manifest: Manifest
    executor: Executor
    comm: Comm
    sum_gradients: bool
    evaluation: Program | None
    step_state: StepState
    guesses: list[Value]
    constants: dict[str, Tensor]

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        executor: Executor,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        comm: Comm,
        sum_gradients: bool = True,
        evaluation: Program | None = None,
    ):
        super().__init__()
        self.path, self.manifest, self.executor, self.comm = path, manifest, executor, comm
        self.sum_gradients, self.evaluation = sum_gradients, evaluation
        self.step_state = StepState()
        self.guesses = [entry.value for entry in executor.program.inputs if entry.kind == "guess"]
        self.constants = {name: tensor.to(executor.device) for name, tensor in buffers.items()}
        refuse_taken(manifest)
        tensors: dict[str, Tensor] = {}
        parameters = {e.value.name for e in executor.program.inputs if e.kind == "parameter"}
        for spec in manifest.parameters:
            value = weights[spec.name].to(executor.device)
            is_parameter = spec.name in parameters
            tensors[spec.name] = nn.Parameter(value, spec.name in manifest.trainable) if is_parameter else value
            place(self, spec.name, tensors[spec.name])
        for alias, name in manifest.aliases.items():
            place(self, alias, tensors[name])

    def compile(self, *args, **kwargs) -> None:
        """Nothing: a program is compiled already, and `engine.compile()` of scripts for AutoSP comes here."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights as transformers' `from_pretrained` reads them; one rank is enough, since all have the same.

        The folder is whole or not there, and replaced if it holds weights and their config only. Raises AutospError:
        `no-recipe`, `output-exists`, `output-unwritable`.
        """
        save_weights(self.path, self.manifest, self.state_dict(), Path(folder))

    def forward(self, **batch) -> Tensor:
        """The loss of a batch, given whole and as the model's own forward takes it.

        Raises ArtifactError: `batch-mismatch` for one of another kind, `batches-differ` unless all ranks have the same.
        """
        if not self.training:
            return self.evaluate(**batch)
        values, device = self._values(self.executor, batch), self.executor.device
        scale = self.step_state.loss_scale
        values |= {v.name: torch.tensor(scale, dtype=DTYPES[v.dtype], device=device) for v in self.guesses}
        trainable = {name: p for name, p in self.named_parameters() if name in self.manifest.trainable}
        self.step_state = replace(self.step_state, number=self.step_state.number + 1)
        return _Step.apply(self, values, list(trainable), *trainable.values())

    def evaluate(self, **batch) -> Tensor:
        """The loss that the model gives in eval mode, without a gradient, the same on every rank; all ranks call it.

        Takes a batch as forward does, and nothing is kept for a backward. It is the same in either mode. `step_state`
        stays: what a model draws in eval mode too follows from it. Raises ArtifactError: `batch-mismatch`, and
        `no-evaluation` where the artifact was built without that program.
        """
        values = self._values(self._evaluator, batch)
        with torch.no_grad():
            return run(self._evaluator, "evaluate", values, self.comm)["loss"].clone()

    @cached_property
    def _evaluator(self) -> Executor:
        """Made when it is first used: a run that only trains starts without it."""
        if self.evaluation is None:
            raise ArtifactError(no_evaluation("evaluate"))
        return Executor(self.evaluation, self.comm.rank, self.executor.device)

    def _values(self, executor: Executor, batch: Mapping) -> dict[str, Tensor]:
        """What a program reads, by name: the batch, checked, what the module holds, and the seed of what is drawn."""
        batch = tensors_built_for(self.manifest, batch)
        check_batch(self.manifest, batch, executor.device)
        check_same_batch(batch, self.comm)
        state = {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        check_state(self.manifest, state, executor.device)
        seeds = [entry.value.name for entry in executor.program.inputs if entry.kind == "seed"]
        seed = step_seed(self.step_state.seed, self.step_state.number)
        dense = {name: tensor.contiguous() for name, tensor in (state | batch).items()}  # as plans take inputs to be
        return {**self.constants, **dense, **dict.fromkeys(seeds, seed)}


def refuse_taken(manifest: Manifest) -> None:
    """Raise ArtifactError (`name-taken`) where parts of the model are called as attributes of a loaded module are."""
    own = {*dir(ShardedModel), *ShardedModel.__annotations__, *vars(nn.Module())}
    names = [spec.name for spec in manifest.parameters] + list(manifest.aliases)
    taken = [part for part in dict.fromkeys(name.partition(".")[0] for name in names) if part in own]
    if taken:
        raise ArtifactError(Problem(
            "name-taken", f"parts of the model are called {', '.join(taken)}", "load",
            "the module that is loaded has attributes of that name",
            "rename them, or build a module that holds the model under another name",
        ))  # fmt: skip


def place(owner: nn.Module, name: str, tensor: Tensor, persistent: bool = True) -> None:
    """Register a tensor under a dotted name; buffers that are `persistent` are part of the state dict."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent)


class _Step(torch.autograd.Function):
    """Forward runs the section forward; backward runs backward and sum_gradients on what it kept."""

    @staticmethod
    def forward(ctx, module: ShardedModel, values: dict[str, Tensor], names: list[str], *parameters: Tensor) -> Tensor:
        ctx.module, ctx.values, ctx.names = module, values, names
        ctx.save_for_backward(*values.values())  # torch refuses to give back one that was written to since
        loss = run(module.executor, "forward", values, module.comm)["loss"]
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        values = ctx.values
        if values is None:
            raise RuntimeError("backward was called twice on one loss: what forward saved is released as it is used")
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: the program holds one backward, and none of that backward")
        _ = ctx.saved_tensors
        ctx.values = None
        values["grad_loss"] = grad_loss
        module = ctx.module
        found = run(module.executor, "backward", values, module.comm)
        if module.sum_gradients:
            found = run(module.executor, "sum_gradients", values, module.comm)
        elif module.comm.rank:
            found = _without_whole(found, module.executor)
        return None, None, None, *_apart([found[f"grad.{name}"] for name in ctx.names])


def _without_whole(found: dict[str, Tensor], executor: Executor) -> dict[str, Tensor]:
    """Zeros for the gradients that are no partial sums: every rank has all of them, and one rank's are enough."""
    names = dict(executor.program.section("backward").gives)
    partial = {label: executor.values[name].placement.partial for label, name in names.items()}
    return {label: gradient if partial[label] else torch.zeros_like(gradient) for label, gradient in found.items()}


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients, copied where they lie in each other's memory: what comes later is added to each of them there.

    A sum of two parameters has one gradient, which is given to both: as it is, or as views.
    """
    last = lambda t: sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))  # noqa: E731
    ends, apart = 0, list(gradients)
    for at in sorted((at for at, t in enumerate(gradients) if t.numel()), key=lambda at: gradients[at].data_ptr()):
        gradient = gradients[at]
        if gradient.data_ptr() < ends:
            apart[at] = gradient.clone()
        ends = max(ends, gradient.data_ptr() + (last(gradient) + 1) * gradient.itemsize)
    return apart


def run(executor: Executor, section: str, values: dict[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    """Run a section to its end, meeting the other ranks over `comm`; the caller's autocast does not reach into it."""
    generator: SectionRun = executor.run(section, values)
    answer: list[Tensor] | None = None
    with torch.autocast(executor.device.type, enabled=False):
        while True:
            try:
                answer = [_met(generator.send(answer), comm)]
            except StopIteration as stop:
                return stop.value


def _met(meeting: Meeting, comm: Comm) -> Tensor:
    if isinstance(meeting, Exchange):
        return comm.exchange(meeting.buffer, meeting.send_sizes, meeting.receive_sizes)
    return comm.sum(meeting.buffer)


def tensors_built_for(manifest: Manifest, batch: Mapping) -> dict[str, Tensor]:
    """The tensors of a batch, nested or flat. Raises ArtifactError (`batch-mismatch`) for constants not the build's."""
    tensors = tensors_of(batch)
    try:
        given = flat({name: value for name, value in batch.items() if name not in tensors})
    except ValueError as error:
        raise _mismatch([str(error)]) from error
    constants, built = constants_of(given), manifest.constants
    wrong = [f"{name} is {value!r}, " + (f"built for {built[name]!r}" if name in built else "not an input")
             for name, value in constants.items() if name not in built or value != built[name]]  # fmt: skip
    if wrong:
        raise _mismatch(wrong)
    return tensors | tensors_of(given)


def _mismatch(problems: list[str]) -> ArtifactError:
    what = "the batch is not the one that was built for"
    return ArtifactError(Problem("batch-mismatch", what, "forward", "\n".join(problems),
                                 "give the whole batch on every rank, or build again for this shape"))  # fmt: skip


def check_batch(manifest: Manifest, batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise ArtifactError (`batch-mismatch`) unless names, shapes and dtypes are the build's, on this device."""
    wanted = {spec.name: spec for spec in manifest.batch}
    problems = [f"{name} is missing" for name in wanted if name not in batch]
    problems += [f"{name} is not an input" for name in batch if name not in wanted]
    for name, tensor in batch.items():
        spec = wanted.get(name)
        if spec is not None and tensor.device.type != device.type:
            problems.append(f"{name} is on {tensor.device.type}, the program runs on {device.type}")
        if spec is not None and (tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]):
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, built for {spec.dtype} {list(spec.shape)}")
    if problems:
        raise _mismatch(problems)


def check_state(manifest: Manifest, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise ArtifactError (`state-mismatch`) where a module was cast or moved since it was loaded."""
    problems = []
    for spec in manifest.parameters:
        tensor, wanted = state[spec.name], (DTYPES[spec.dtype], spec.shape, device.type)
        if (tensor.dtype, tuple(tensor.shape), tensor.device.type) != wanted:
            found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"
            problems.append(f"{spec.name} is {found}, built for {spec.dtype} {list(spec.shape)} on {device.type}")
    if problems:
        more = [f"and {len(problems) - 3} more"] if problems[3:] else []
        raise ArtifactError(Problem(
            "state-mismatch", "the module's parameters are not those that its program was built for", "forward",
            "\n".join(problems[:3] + more), "leave the module as it was loaded; for another dtype, build a model of it"
        ))  # fmt: skip
