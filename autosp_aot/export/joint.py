"""The whole training step as one graph: forward, loss and every gradient, captured on fake tensors.

    module, batch  --torch.export-->  forward graph  --canonical attention-->  --joint autograd-->  one ATen graph

Parameters are one by identity (tied weights), under the names of `named_parameters()`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._functorch import aot_autograd
from torch._functorch._aot_autograd import descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.attention.attention import canonical_attention
from autosp_aot.export.canonical.decompose import DECOMPOSITIONS
from autosp_aot.export.canonical.indices import refuse_indices
from autosp_aot.export.canonical.randomness import refuse_random
from autosp_aot.export.complex import Complex, as_pair, as_real
from autosp_aot.export.diagnose import (
    diagnosed,
    refuse_mutation,
    refuse_operators,
    refuse_other_gradients,
)
from autosp_aot.export.experts.routing import canonical_routing
from autosp_aot.export.flags import eager_flags
from autosp_aot.export.functions import FunctionCall, marked_functions, restore_functions
from autosp_aot.export.keeping import left_alone
from autosp_aot.export.loss import LossOnly
from autosp_aot.export.modules import refuse_modules
from autosp_aot.export.regions import SET_GRAD, Flat, flat_regions, spell_casts
from autosp_aot.export.sharing import refuse_shared
from autosp_aot.export.source import module_path, where
from autosp_aot.export.state import refuse_state
from autosp_aot.export.subject import Subject, silence
from autosp_aot.export.watch import refuse_hooks

aten = torch.ops.aten
ASSERTIONS = (
    aten._assert_async.msg, aten._assert_async.default, aten._assert_tensor_metadata.default,
    aten._assert_scalar.default, aten.sym_constrain_range_for_size.default,
)  # fmt: skip


@dataclass(frozen=True)
class Joint:
    """The captured step. `inputs` are (kind, name) of the placeholders, `outputs` the labels of the graph's results.

    `constants` are the values of tensors that forward makes of literals (`torch.tensor(0.5)`), inputs like buffers.
    `calls` are those of forward as it was exported, by which two captures of it are seen to be the same; `place` is the
    line where it begins.
    """

    graph_module: GraphModule
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    calls: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Forward:
    """The exported forward of a model that returns nothing but its loss, for inputs of `mode`; `place` is its line."""

    exported: torch.export.ExportedProgram
    wrapped: LossOnly
    functions: list[FunctionCall]
    batch: Mapping[str, Tensor]
    mode: FakeTensorMode
    place: str

    def calls(self) -> tuple[str, ...]:
        """What it calls, on what; whether gradients are on is left out."""
        return tuple(node.format_node() for node in self.exported.graph.nodes if node.target is not SET_GRAD)

    def literals(self) -> dict[str, Tensor]:
        """The tensors that it makes of literals."""
        names = self.exported.graph_signature.inputs_to_lifted_tensor_constants.values()
        values = {module_path(name): self.exported.constants[name] for name in names}
        return {name: as_real(value) for name, value in values.items() if not isinstance(value, FakeTensor)}


def capture(subject: Subject) -> Joint:
    """Capture the step of a model. Raises BuildError."""
    refuse_modules(subject.model)
    refuse_hooks(subject.model)
    refuse_shared(subject.model)
    loss, model, failure = refuse_state(subject)
    forward = export_forward(subject)
    refuse_indices(forward.exported)
    captured = capture_exported(forward)
    if failure is not None:
        raise failure
    gradients = {label.removeprefix("grad.") for label in captured.outputs if label.startswith("grad.")}
    refuse_other_gradients(loss, model, gradients, subject.place)
    if not gradients:
        raise BuildError(_nothing_trains(model, subject.place))
    return captured


def _nothing_trains(model: nn.Module, place: str) -> Problem:
    what, why = "no parameter gets a gradient", "there is nothing for a step to train"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return Problem("nothing-trains", what, place, f"{why}: what is taken for the loss depends on none of them",
                       "return the loss itself, not detached: alone, first, or as .loss or ['loss']")  # fmt: skip
    return Problem("nothing-trains", what, place, why, "set requires_grad of what is to be trained")


def export_forward(subject: Subject) -> Forward:
    """Export forward up to the loss, as the model's modes and `torch.is_grad_enabled()` have it."""
    model, mode = subject.copy()
    batch = subject.inputs(mode)
    with left_alone(subject.model), subject.running(), flat_regions(), marked_functions() as calls, eager_flags(), mode:
        exported = torch.export.export(model, (), batch, strict=False)
    _drop_assertions(exported.graph)
    exported.graph.eliminate_dead_code()  # what an assertion alone has read
    return Forward(exported, model, calls, batch, mode, subject.place)


def _drop_assertions(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)


def capture_exported(forward: Forward) -> Joint:
    """The canonical graph of what was exported: with every gradient, or of the loss alone where gradients are off."""
    exported, batch, place, calls = forward.exported, forward.batch, forward.place, forward.calls()
    spell_casts(exported.graph)
    canonical_routing(exported)
    refuse_operators(exported, forward.wrapped)
    restore_functions(exported, forward.functions)
    canonical_attention(exported)
    step = Step(exported, forward.wrapped)
    forward.mode.allow_non_fake_inputs = True  # constants that the backward of a user's Function reads
    with diagnosed(place), silence(), forward.mode, contextlib.ExitStack() as stack:
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        joint = aot_autograd.aot_export_joint_with_descriptors(
            stack, step, (), dict(batch), decompositions=DECOMPOSITIONS
        )
    _drop_assertions(joint.graph_module.graph)
    inputs, outputs = _described(joint.graph_module, step, list(batch), place)
    refuse_random(joint.graph_module.graph)
    return Joint(joint.graph_module, inputs, outputs, forward.literals(), calls, place)


class Step(nn.Module):
    """The exported forward with each parameter and buffer held once, run node by node so that its sources are kept."""

    def __init__(self, exported: torch.export.ExportedProgram, wrapped: nn.Module):
        super().__init__()
        self.exported = [exported]
        signature = exported.graph_signature
        self.slots: dict[str, tuple[str, int]] = {}
        self.parameter_names: list[str] = []
        self.buffer_names: list[str] = []
        self.pairs: set[int] = set()  # the buffers that are complex values
        own = {id(p): name for name, p in wrapped.named_parameters()}
        by_name = dict(wrapped.named_parameters(remove_duplicate=False))
        parameters: dict[str, nn.Parameter] = {name: p for name, p in wrapped.named_parameters()}
        self.parameter_list = nn.ParameterList(parameters.values())
        self.parameter_names = list(parameters)
        for placeholder, name in signature.inputs_to_parameters.items():
            self.slots[placeholder] = ("parameter", self.parameter_names.index(own[id(by_name[name])]))
        first = {id(buffer): name for name, buffer in wrapped.named_buffers()}
        buffers = dict(wrapped.named_buffers(remove_duplicate=False))
        constants = {**buffers, **exported.constants}
        homes = {parameter.untyped_storage()._cdata: at for at, parameter in enumerate(self.parameter_list)}
        for placeholder, name in {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}.items():
            if (home := constants[name].untyped_storage()._cdata) in homes:
                self.slots[placeholder] = ("parameter", homes[home])  # one that forward has not from its module
                continue
            own_name = first[id(buffers[name])] if name in buffers else name
            if own_name not in self.buffer_names:
                if constants[name].is_complex():
                    self.pairs.add(len(self.buffer_names))
                self.register_buffer(f"b{len(self.buffer_names)}", as_real(constants[name]))
                self.buffer_names.append(own_name)
            self.slots[placeholder] = ("buffer", self.buffer_names.index(own_name))

    def forward(self, **batch: Tensor) -> Tensor:
        module = self.exported[0].graph_module
        args = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                kind, at = self.slots.get(node.name, ("batch", 0))
                held = {"parameter": lambda i: self.parameter_list[i], "buffer": self.buffer}
                args.append(batch[_input_name(node, self.exported[0])] if kind == "batch" else held[kind](at))
        return Flat(module).run(*args)[0]

    def buffer(self, at: int) -> Tensor | Complex:
        value = getattr(self, f"b{at}")
        return as_pair(value) if at in self.pairs else value


def _input_name(node: Node, exported) -> str:
    names = exported.graph_signature.user_inputs
    keys = list(exported.example_inputs[1])
    return keys[list(names).index(node.name)]


def _described(module: GraphModule, step: Step, batch_names: list[str], place: str) -> tuple[tuple, tuple]:
    """Every placeholder as (kind, name) and the label of every result, by what its descriptor says it is."""
    inputs = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs.append(_input(node.meta["desc"], step, batch_names))
    output = next(n for n in module.graph.nodes if n.op == "output")
    labels, changed = [], {}
    for node, desc in zip(output.args[0], output.meta["desc"]):
        if node is None:
            labels.append("")
        elif isinstance(desc, descriptors.GradAOTOutput):
            labels.append(f"grad.{_input(desc.grad_of, step, batch_names)[1]}")
        elif isinstance(desc, descriptors.PlainAOTOutput):
            labels.append("loss")
        else:
            assert isinstance(desc, descriptors.InputMutationAOTOutput), desc
            kind, name = _input(desc.mutated_input, step, batch_names)
            changed[f"{kind} {name!r}"] = where(node).source or place
    refuse_mutation(changed)
    return tuple(inputs), tuple(labels)


def _input(desc, step: Step, batch_names: list[str]) -> tuple[str, str]:
    if isinstance(desc, descriptors.ParamAOTInput):
        return "parameter", module_path(step.parameter_names[int(desc.target.rpartition(".")[2])])
    if isinstance(desc, descriptors.BufferAOTInput):
        return "buffer", module_path(step.buffer_names[int(desc.target[1:])])
    if isinstance(desc, descriptors.TangentAOTInput):
        return "tangent", "grad_loss"
    return "batch", batch_names[desc.idx]
