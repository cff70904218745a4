"""A rank's program as a `.pt2` file: an ExportedProgram of ATen operators that torch loads without this package.

    program = torch.export.load("llama.sp2.rank0.pt2").module()
    program.load_state_dict(load_file("llama.sp2/weights/model.safetensors"), assign=True)
    results = program(input_ids=ids, labels=labels, grad_loss=torch.ones(()))      loss, and grad.<parameter>

The executor's own steps are traced, forward, backward and sum_gradients in order. Collectives are torch's functional
ones (`_c10d_functional`) over the default process group; a file for one rank has none. Values that wait in host memory
stay on the device. Weights are not in the file (until some are loaded they are not numbers), other buffers are.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives  # noqa: F401 registers how tracing sees them
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_aot.artifact.manifest import BUFFERS, Manifest
from autosp_aot.artifact.read import read_tensors
from autosp_aot.commands.interchange.output import write_whole
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Instr, Program, rename
from autosp_aot.ir.structure.table import FREE, copies
from autosp_aot.runtime.comm import check_devices
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.module import place, run
from autosp_aot.runtime.operators import check_operators
from autosp_aot.targets.table import TARGETS

GROUP = "0"  # torch's name of the default process group
collectives = torch.ops._c10d_functional


def write_pt2(program: Program, manifest: Manifest, rank: int, path: Path, out: Path) -> None:
    """Write rank `rank`'s program (`Program.for_rank`) of the artifact at `path` to `out`.

    Raises BuildError (`output-unwritable`) and ArtifactError: `wrong-device` where the target is not this machine's,
    `operator-changed` where torch is not the build's in an operator.
    """
    check_devices(manifest.target, 1)
    check_operators(program, manifest)
    exported = exported_program(program, manifest, rank, read_tensors(path, manifest, BUFFERS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # none of the absent values is
        write_whole(out, lambda file: torch.export.save(exported, file))


def exported_program(
    program: Program, manifest: Manifest, rank: int, buffers: Mapping[str, Tensor]
) -> torch.export.ExportedProgram:
    """Rank `rank`'s program as torch exports it; `buffers` are the values that no checkpoint holds."""
    mode, device = FakeTensorMode(), torch.device(TARGETS[manifest.target].device_type)
    with mode:
        empty = lambda spec: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device)  # noqa: E731
        inputs = {entry.value.name: empty(entry.value) for entry in program.inputs}
        graph, labels = _traced(_plain(program), rank, device, inputs)
        stored = {spec.name: empty(spec) for spec in manifest.parameters}
    held = {name: tensor.to(device) for name, tensor in buffers.items()}
    step = _Step(graph, labels, list(inputs), stored, held)
    given = {_keyword(name): tensor for name, tensor in inputs.items() if name not in stored | held}
    with mode:
        exported = torch.export.export(step, (), given, strict=False)
    exported.example_inputs = None  # they would be pickled
    exported.state_dict.update({name: _absent(tensor) for name, tensor in stored.items()})
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # where this package lies on this machine
    return exported


def _plain(program: Program) -> Program:
    """The program without what is said of memory alone: releases, results written in place, copies to the host."""
    same: dict[str, str] = {}

    def instrs(old: tuple[Instr, ...]) -> tuple[Instr, ...]:
        kept = []
        for instr in old:
            if copies(instr.op):
                source = instr.refs()[0]
                same[instr.values()[0].name] = same.get(source, source)
            elif instr.op != FREE:
                body = instr.body and replace(instr.body, instrs=instrs(instr.body.instrs))
                kept.append(rename(replace(instr, into=None, body=body), same))
        return tuple(kept)

    sections = [replace(section, instrs=instrs(section.instrs)) for section in program.sections]
    given = [tuple((label, same.get(name, name)) for label, name in section.gives) for section in sections]
    return replace(program, sections=tuple(replace(s, gives=gives) for s, gives in zip(sections, given)))


def _traced(
    program: Program, rank: int, device: torch.device, inputs: Mapping[str, Tensor]
) -> tuple[GraphModule, list[str]]:
    """What the executor does to fake inputs, as a graph; and the labels of its results."""
    executor, comm = Executor(program, rank, device, traced=True), _Traced(rank, program.ranks)
    labels: list[str] = []

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(inputs, tensors))
        results: dict[str, Tensor] = {}
        for section in program.sections:
            results |= run(executor, section.name, values, comm)
        labels.extend(results)
        return tuple(results.values())

    with torch.no_grad():
        graph = make_fx(step)(*inputs.values())
    graph.graph.eliminate_dead_code()
    return graph, labels


class _Traced:
    """How a rank meets the others in a graph (`runtime.module.Comm`)."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def exchange(self, buffer: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        if self.size == 1:
            return buffer
        return collectives.wait_tensor(collectives.all_to_all_single(buffer, receive_sizes, send_sizes, GROUP))

    def sum(self, buffer: Tensor) -> Tensor:
        if self.size == 1:
            return buffer
        return collectives.wait_tensor(collectives.all_reduce(buffer, "sum", GROUP))


class _Step(nn.Module):
    """The graph with stored values under their names, and all else by keyword."""

    def __init__(
        self,
        graph: GraphModule,
        labels: list[str],
        names: list[str],
        stored: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ):
        super().__init__()
        self._graph, self._labels, self._names = graph, labels, names
        for name, tensor in stored.items():
            place(self, name, tensor)
        for name, tensor in buffers.items():
            place(self, name, tensor, persistent=False)

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        held = dict(self.named_buffers())
        values = (held[name] if name in held else given[_keyword(name)] for name in self._names)
        return dict(zip(self._labels, self._graph(*values)))


def _keyword(name: str) -> str:
    """An input's name as Python takes it: `early.grad_loss` as early_grad_loss."""
    return name.replace(".", "_")


def _absent(tensor: Tensor) -> Tensor:
    """What stands for a value that is not in the file: not a number, or zero, of one element's size."""
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
