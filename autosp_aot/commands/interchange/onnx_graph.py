"""A rank's program as a graph of ONNX: forward, backward and sum_gradients in order, a node for each instruction.

    %h: f32[32, 64] @ Shard(0, cut64) = aten.mm.default(%x, %w)    h = MatMul(x, w)
    %r: f32[32, 1] @ Shard(0, cut64) = aten.rsqrt.default(%v)      r = aten.rsqrt.default(v)
    %a: f32[1, 4, 64, 16] @ Shard(1, cut8) = all_to_all(%q)        a = autosp.all_to_all(q), group=, send_sizes=, ...
    free(%x)                                                       nothing: ONNX has no lifetimes

Nodes of the domains `aten` and `autosp` have an attribute for each argument that is no tensor, and `operands`, the name
of the argument that each input is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, StringStringEntryProto, TensorProto, helper

from autosp_aot.commands.interchange.onnx_calls import TYPES, Constant, named
from autosp_aot.commands.interchange.onnx_operators import standard
from autosp_aot.errors import Problem
from autosp_aot.ir.placement import PARTIAL, Placement
from autosp_aot.ir.program import Body, Dtype, Instr, Program, Ref, Value, flatten, map_instr, values_of
from autosp_aot.ir.structure.record import At, Structural
from autosp_aot.ir.structure.table import FREE, STRUCTURE, TILES
from autosp_aot.ir.transfers import Shard, places_of_tile

DOMAIN, ATEN = "autosp", "aten"
SHORT = 16  # numbers of a constant that are its name


@dataclass
class GraphBuilder:
    """Nodes of one graph; `constants` and `refused` are shared with the graphs inside of it."""

    program: Program
    rank: int
    nodes: list[NodeProto] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    refused: dict[str, Problem] = field(default_factory=dict)

    def __post_init__(self):
        self.values = self.values or {entry.value.name: entry.value for entry in self.program.inputs}
        self.outer = set(self.values)

    def add(self, instr: Instr, section: str, box: int | None = None) -> None:
        """Add what an instruction is; `box` is which of the boxes of a body's values it makes, a rank's or a tile's."""
        if instr.op == FREE:
            return
        operands = {name: self.values[name] for name in instr.refs()}
        self.values.update(values_of([instr]))
        node = NodeProto(name=instr.values()[0].name, doc_string=instr.where.source)
        used = max(at for at, out in enumerate(instr.outs) if out is not None)
        node.output.extend("" if out is None else out.name for out in instr.outs[: used + 1])
        try:
            if instr.body is not None:
                self.tiles(node, instr, instr.body, section)
            elif (record := STRUCTURE.get(instr.op)) is not None:
                at = At(self.rank, self.program.ranks, self.rank if box is None else box)
                self.structure(node, instr, record, at)
            else:
                self.call(node, instr, operands)
        except _Unheld as error:
            self.refused.setdefault(instr.op, Problem(
                "onnx-cannot-carry", f"{instr.op} cannot be a node of ONNX", instr.where.source, str(error),
                "export with --format pt2"))  # fmt: skip
            return
        _say(node.metadata_props, section=section, module=instr.where.module, op=instr.op)
        self.nodes.append(node)

    def call(self, node: NodeProto, instr: Instr, operands: Mapping[str, Value]) -> None:
        """A call of ATen's or ours."""
        found = standard(instr, operands) if instr.op.startswith("aten.") else None
        if found is None:
            node.domain, _, node.op_type = instr.op.partition(".")
            self.named(node, named(instr))
            return
        node.op_type = found.op
        node.input.extend(self.constant(i) if isinstance(i, Constant) else i.name if i else "" for i in found.inputs)
        plain = {name: _tensor(v) if isinstance(v, Constant) else v for name, v in found.attributes.items()}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in plain.items())

    def shard(self, node: NodeProto, source: Value, target: Value, at: At) -> None:
        """A rank's part of what it has: one run of positions, or several put together."""
        shard = Shard(source, target, at.rank, at.box)
        runs = [next(part[1:] for part in piece if part[0] == shard.dim) for piece in shard.boxes] or [(0, 0)]
        if len(runs) == 1:
            node.op_type, ints = "Slice", [(runs[0][0],), (runs[0][1],), (shard.dim,)]
            node.input.extend([source.name, *(self.constant(Constant("i64", numbers)) for numbers in ints)])
            return
        node.op_type, places = "Gather", tuple(at for start, stop in runs for at in range(start, stop))
        node.input.extend([source.name, self.constant(Constant("i64", places))])
        node.attribute.append(helper.make_attribute("axis", shard.dim))

    def structure(self, node: NodeProto, instr: Instr, record: Structural, at: At) -> None:
        """A collective or a copy: who takes part, and what each rank sends and receives; a shard is ONNX's own."""
        sources, targets = [self.values[name] for name in instr.refs()], instr.values()
        if record.attributes is None:
            self.shard(node, sources[0], targets[0], at)
            return
        node.domain, node.op_type = DOMAIN, instr.op
        node.input.extend(instr.refs())
        facts = record.attributes(instr, sources, targets, at)
        node.attribute.extend(_attribute(name, value) for name, value in facts.items())

    def tiles(self, node: NodeProto, instr: Instr, body: Body, section: str) -> None:
        """A graph for each tile, and where its results belong; they are added up where `sums` is 1."""
        node.domain, node.op_type = DOMAIN, TILES
        node.input.extend(instr.refs())
        outs = instr.values()
        inside = {name: self.values[name] for name in instr.refs()} | values_of(body.instrs)
        graphs, places = [], []
        for tile in range(body.tiles):
            box = self.rank * body.tiles + tile
            graph = GraphBuilder(self.program, self.rank, [], dict(self.values), self.constants, self.refused)
            for inner in body.instrs:
                graph.add(map_instr(inner, lambda n: n.values[tile]), section, box)
            own = [graph.values[name] for name in body.gives]
            if not self.refused:
                graphs.append(graph.graph(f"tile{tile}", [], [info_of(value) for value in own]))
            parts = zip((inside[name] for name in body.gives), outs)
            places.append([places_of_tile(part, out, box, self.rank) for part, out in parts])
        sums = tuple(int(inside[name].placement == PARTIAL) for name in body.gives)
        node.attribute.extend([_attribute("sums", sums), _attribute("places", json.dumps(places))])
        node.attribute.append(AttributeProto(name="tiles", type=AttributeProto.GRAPHS, graphs=graphs))

    def named(self, node: NodeProto, arguments: Mapping[str, object]) -> None:
        """Inputs and attributes of a node that has the arguments of a call by name; what is None is left out."""
        operands = []
        for name, argument in arguments.items():
            if isinstance(argument, Ref):
                operands.append((name, argument.name))
            elif isinstance(argument, tuple) and any(isinstance(leaf, Ref) for leaf in flatten(argument)):
                found = [(f"{name}.{at}", leaf) for at, leaf in enumerate(argument) if leaf is not None]
                if not all(isinstance(leaf, Ref) for _, leaf in found):
                    raise _Unheld(f"{name} is a list of tensors and of something else")
                operands.extend((place, leaf.name) for place, leaf in found)
            elif argument is not None:
                node.attribute.append(_attribute(name, argument))
        node.input.extend(name for _, name in operands)
        if operands:
            node.attribute.append(helper.make_attribute("operands", [place for place, _ in operands]))

    def constant(self, constant: Constant) -> str:
        """The name of a constant that the graph has from now on."""
        name = _name(constant)
        if name not in self.constants:
            self.constants[name] = _tensor(constant, name)
        return name

    def give(self, label: str, name: str) -> onnx.ValueInfoProto:
        """An output of the graph, under its label."""
        if label != name:
            if label in self.values:
                self.refused[label] = Problem("onnx-cannot-carry", f"{label} is a result and the name of another value",
                                              fix="give the input or the module of that name another one")  # fmt: skip
            self.nodes.append(helper.make_node("Identity", [name], [label], name=label))
        value = self.values[name]
        return info_of(Value(label, value.dtype, value.shape, value.placement))

    def graph(self, name: str, inputs, outputs) -> GraphProto:
        own = [info_of(value) for key, value in self.values.items() if key not in self.outer]
        given = {output.name for output in outputs}
        return helper.make_graph(self.nodes, name, inputs, outputs, value_info=[v for v in own if v.name not in given])


class _Unheld(Exception):
    """An argument that no attribute can hold."""


def _attribute(name: str, argument) -> AttributeProto:
    """An argument as an attribute. Floats are fp64 tensors, since ONNX's own are fp32; nested lists are JSON text."""
    if isinstance(argument, Dtype):
        return helper.make_attribute(name, argument.name)
    if isinstance(argument, tuple) and any(not isinstance(item, (bool, int, float)) for item in argument):
        return helper.make_attribute(name, json.dumps(argument))
    numbers = argument if isinstance(argument, tuple) else (argument,)
    if any(isinstance(number, float) for number in numbers):
        return helper.make_attribute(name, _tensor(Constant("f64", argument)))
    if any(isinstance(number, int) and not -(2**63) <= number < 2**63 for number in numbers):
        raise _Unheld(f"{name} is {argument}, which 64 bits do not hold")
    if isinstance(argument, tuple):
        return helper.make_attribute(name, [int(n) for n in argument], attr_type=AttributeProto.INTS)
    return helper.make_attribute(name, int(argument) if isinstance(argument, bool) else argument)


def _tensor(constant: Constant, name: str = "") -> TensorProto:
    numbers = constant.numbers
    if isinstance(numbers, tuple):
        return helper.make_tensor(name, TYPES[constant.dtype], [len(numbers)], numbers)
    return helper.make_tensor(name, TYPES[constant.dtype], [], [numbers])


def _name(constant: Constant) -> str:
    """What a constant is, as far as that is short."""
    numbers = constant.numbers
    if not isinstance(numbers, tuple):
        return f"{constant.dtype}({numbers})"
    digest = hashlib.sha256(str(numbers).encode()).hexdigest()[:16]
    said = f"{len(numbers)} numbers, {digest}" if len(numbers) > SHORT else ", ".join(map(str, numbers))
    return f"{constant.dtype}[{said}]"


def info_of(value: Value, kind: str = "") -> onnx.ValueInfoProto:
    info = helper.make_tensor_value_info(value.name, TYPES[value.dtype], value.sizes)
    _say(info.metadata_props, kind=kind, placement=_said(value.placement))
    return info


def _said(placement: Placement) -> str:
    """A placement, with the intervals of all ranks."""
    cut = placement.cut
    if cut is None:
        return "Partial" if placement.partial else "Replicate"
    bounds = " ".join(f"{lo}:{hi}" for lo, hi in cut.bounds)
    return f"Shard({cut.dim}, {bounds}, outer={cut.outer}{', partial' if placement.partial else ''})"


def _say(properties, **said: str) -> None:
    properties.extend(StringStringEntryProto(key=key, value=value) for key, value in said.items() if value)
