"""Constants of the exported graph: what does not depend on batch or parameters is found without making anything large.

keys = arange(S)[None, :]            [1, S], computed
mask = zeros([S, S])                 stored as [1, 1]: every dim along which it repeats is narrowed to size one
mask = keys <= rows                  not a constant here: it varies along two dims
"""

import operator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from autosp_aot.ir.operators import elementwise

aten = torch.ops.aten

# What is no elementwise operator is computed for real up to this size: [B, S], not [S, S].
COMPUTED = 2**24
FILLED = (aten.full.default, aten.new_ones.default, aten.ones.default, aten.zeros.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device)

Known = Tensor | None


def constants_of(exported: ExportedProgram) -> dict[Node, Known]:
    """What is known before looking: nothing of a tensor that is written to; lifted constants, and buffers that no
    checkpoint holds."""
    known: dict[Node, Known] = dict.fromkeys(written(exported.graph))
    signature = exported.graph_signature
    named = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    stored = set(signature.buffers) - set(signature.non_persistent_buffers)
    for node in exported.graph.nodes:
        name = named.get(node.name)
        value = exported.state_dict.get(name, exported.constants.get(name))
        if name in stored or not isinstance(value, Tensor) or isinstance(value, FakeTensor) or node in known:
            continue
        known[node] = _once(value.detach())
    return known


def evaluate(node: Node, known: dict[Node, Known], most: int = 0) -> Known:
    """The value of a node, with every repeated dim stored once; None where it is not known, or has more than `most`
    elements and varies along two dims."""
    if node not in known:
        known[node] = _evaluate(node, known, most)
    return known[node]


def written(graph: Graph) -> set[Node]:
    """Every node that shares its storage with something written in place, where anybody could see the difference.

    mask = zeros([S, S])
    row = select(mask, 0, 3)
    fill_(row, -inf)              mask and row are written; an evaluation of `mask` alone would miss it
    """
    source: dict[Node, Node] = {}
    dirty = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is operator.getitem:
                source[node] = source.get(node.args[0], node.args[0])
            continue
        given = arguments(node)
        for argument in node.target._schema.arguments:
            operand = given.get(argument.name)
            if argument.alias_info is None or not isinstance(operand, Node) or node.target is aten.detach_.default:
                continue
            if argument.alias_info.is_write and operand not in source and len(operand.users) == 1:
                continue
            source[node] = source.get(operand, operand)
            if argument.alias_info.is_write:
                dirty.add(source[node])
    return {node for node in graph.nodes if source.get(node, node) in dirty}


def arguments(node: Node) -> dict:
    """The arguments of a call by name, defaults filled in."""
    named = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in named if argument.has_default_value()}
    return given | dict(zip((argument.name for argument in named), node.args)) | node.kwargs


def functional(target: object) -> torch._ops.OpOverload | None:
    """The operator that gives what an in-place one writes; what others see of the write is `written`'s matter."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target if isinstance(target, torch._ops.OpOverload) else None
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def is_elementwise(target: torch._ops.OpOverload) -> bool:
    return elementwise(str(target), in_scores=True) or target in CASTS


def _evaluate(node: Node, known: dict[Node, Known], most: int) -> Known:
    if not isinstance(node.meta.get("val"), Tensor) or node.op != "call_function":
        return None
    target = functional(node.target)
    if target is None or torch.Tag.nondeterministic_seeded in target.tags or target.namespace != "aten":
        return None
    found = [evaluate(operand, known, most) for operand in node.all_input_nodes]
    operands = [value for value in found if value is not None]
    if len(operands) < len(found):
        return None
    shape = node.meta["val"].shape
    if target is aten.expand.default:
        return operands[0].reshape([1] * (len(shape) - operands[0].dim()) + list(operands[0].shape))
    if target in FILLED:
        args = [[1] * len(shape) if isinstance(arg, (list, tuple)) else arg for arg in node.args]
        return target(*map_arg(tuple(args), known.get), **node.kwargs)
    pointwise = is_elementwise(target)
    if pointwise and len(set().union(*map(_varying, operands))) > 1 and node.meta["val"].numel() > most:
        return None
    if not pointwise and max(n.meta["val"].numel() for n in (node, *node.all_input_nodes)) > COMPUTED:
        return None
    values = dict(zip(node.all_input_nodes, operands))
    whole = lambda n: values[n] if pointwise else values[n].expand(n.meta["val"].shape)  # noqa: E731
    try:
        return _once(target(*map_arg(node.args, whole), **map_arg(node.kwargs, whole)))
    except RuntimeError:  # what eager raises as well: a fill value that its dtype does not hold
        return None


def _once(tensor: Tensor) -> Tensor:
    """The tensor with every dim along which it only repeats itself narrowed to size one."""
    for dim in range(tensor.dim()):
        first = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
        if tensor.shape[dim] > 1 and bool((tensor == first).all()):
            tensor = first
    return tensor


def _varying(tensor: Tensor) -> set[int]:
    return {dim - tensor.dim() for dim, size in enumerate(tensor.shape) if size > 1}
