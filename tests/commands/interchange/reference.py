"""ONNX's reference evaluator with our operators plugged in: ATen's through torch, ours through the runtime's kernels.

Standard nodes are computed by onnx itself, in numpy. Ranks are threads that meet in their collectives. Whatever is
needed to run a node is read off the node: `operands` and attributes, group, sizes and boxes.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import onnx
import torch
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from autosp_aot.ir.operators import DTYPES, overload, wide
from autosp_aot.ir.transfers import join_into, narrowed
from autosp_aot.ops.table import OURS

WAIT_S = 60


class Meeting:
    """Where the ranks hand each other tensors."""

    def __init__(self, ranks: int):
        self.barrier, self.given = Barrier(ranks), [None] * ranks

    def exchange(self, rank: int, mine: list[Tensor]) -> list[list[Tensor]]:
        """What every rank gave, by rank."""
        self.given[rank] = mine
        self.barrier.wait(WAIT_S)
        found = list(self.given)
        self.barrier.wait(WAIT_S)
        return found


def evaluate(models: list[ModelProto], inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """All ranks' models together, on the same inputs by name: each rank's outputs by name.

    The evaluator compares shape and dtype of every value with what the model says of it.
    """
    meeting = Meeting(len(models))

    def run(rank: int) -> dict[str, Tensor]:
        model = models[rank]
        evaluator = ReferenceEvaluator(model, new_ops=_operators(model, rank, meeting))
        given = {value.name: inputs[value.name].detach().numpy() for value in model.graph.input}
        try:
            with np.errstate(all="ignore"):  # torch does not warn of infinities either
                found = evaluator.run(None, given, check_shape_annotations=True)
        except BaseException:
            meeting.barrier.abort()  # the others wait for this rank
            raise
        return {name: torch.from_numpy(np.array(array)) for name, array in zip(evaluator.output_names, found)}

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(run, range(len(models))))


def _operators(model: ModelProto, rank: int, meeting: Meeting) -> list[type[OpRun]]:
    nodes = list(model.graph.node)
    for node in nodes:
        nodes.extend(inner for attribute in node.attribute for graph in attribute.graphs for inner in graph.node)
    kinds = {(node.domain, node.op_type) for node in nodes if node.domain}
    return [GatherElements, *(_operator(domain, kind, rank, meeting) for domain, kind in sorted(kinds))]


class GatherElements(OpRun):
    """The one standard operator that is not onnx's own: that is made of np.choose, which takes 32 choices at most."""

    def _run(self, data, indices, axis):
        return (np.take_along_axis(data, indices, axis),)


def _operator(domain: str, kind: str, rank: int, meeting: Meeting) -> type[OpRun]:
    if kind == "tiles":
        return type(kind, (_Tiles,), {"op_domain": domain})

    def run(self, *arrays, **_):
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        if domain == "aten" or f"{domain}.{kind}" in OURS:
            found = _call(f"{domain}.{kind}", tensors, attributes)
        elif kind in ("offload", "fetch", "wait", "relayout"):
            found = tensors[:1]
        elif kind == "all_reduce":
            found = _summed(meeting.exchange(rank, tensors))
        else:
            found = [_moved(meeting, rank, tensors[0], attributes)]
        return tuple(np.zeros(()) if tensor is None else tensor.numpy() for tensor in found)

    return type(kind, (OpRun,), {"op_domain": domain, "_run": run})


def _call(op: str, tensors: list[Tensor], attributes: dict) -> list[Tensor]:
    """A call of ATen's or ours, from a node."""
    arguments: dict[str, object] = {}
    for place, tensor in zip(attributes.pop("operands", []), tensors):
        name, _, at = place.decode().partition(".")
        if not at:
            arguments[name] = tensor
            continue
        items = arguments.setdefault(name, [])
        items.extend([None] * (int(at) - len(items)) + [tensor])
    function, kinds = OURS[op].kernel if op in OURS else overload(op), {}
    if op in OURS:
        needed = [name for name, by_place in OURS[op].arguments.items() if by_place]
    else:
        kinds = {a.name: str(a.type) for a in function._schema.arguments}
        needed = [a.name for a in function._schema.arguments if not a.has_default_value()]
    arguments |= {name: _value(value, kinds.get(name, "")) for name, value in attributes.items()}
    if op in OURS:  # numpy keeps no layout
        placed, scoring = [arguments.pop(name, None) for name in needed], arguments
        found = function(*OURS[op].laid_out(placed, scoring, "cpu"), **scoring)
    else:
        found = function(**dict.fromkeys(needed) | arguments)
    return [found] if isinstance(found, Tensor) else list(found)


def _value(value, kind: str):
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value).tolist()
    if isinstance(value, bytes):
        text = value.decode()
        return _nested(json.loads(text)) if text.startswith("[") else DTYPES.get(text, text)
    if "bool" in kind:
        return bool(value) if kind == "bool" else [bool(item) for item in value]
    return list(value) if isinstance(value, (list, tuple)) else value


def _nested(value):
    return tuple(map(_nested, value)) if isinstance(value, list) else value


def _summed(given: list[list[Tensor]]) -> list[Tensor]:
    return [sum(t.to(wide(t.dtype)) for t in tensors).to(tensors[0].dtype) for tensors in zip(*given)]


def _moved(meeting: Meeting, rank: int, tensor: Tensor, attributes: dict) -> Tensor:
    """An all_to_all, all_gather or reduce_scatter, by the boxes that its node has."""
    assert attributes["group"] == list(range(len(meeting.given))) and attributes["rank"] == rank
    buffer = tensor.new_empty(sum(attributes["send_sizes"]))
    join_into(buffer, [narrowed(tensor, box) for box in json.loads(attributes["sends"])])
    given = meeting.exchange(rank, list(buffer.split(list(attributes["send_sizes"]))))
    parts = [sent[rank] for sent in given]
    assert [part.numel() for part in parts] == list(attributes["receive_sizes"])
    result = tensor.new_zeros(list(attributes["shape"]), dtype=wide(tensor.dtype))
    places = [narrowed(result, box) for box in json.loads(attributes["fills"])]
    for place, part in zip(places, torch.cat(parts).split([place.numel() for place in places])):
        place.add_(part.view(place.shape)) if attributes["sum"] else place.copy_(part.view(place.shape))
    return result.to(tensor.dtype)


class _Tiles(OpRun):
    """One tile's graph after the other; their results are put in place, or added up."""

    def need_context(self) -> bool:
        return True

    def _run(self, *_, context, **__):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        own = {name: self.run_params[name] for name in ("opsets", "evaluator_cls")}
        operators, places = list(self.run_params["new_ops"].values()), json.loads(attributes["places"])
        evaluators = [own["evaluator_cls"](graph, own["opsets"], new_ops=operators) for graph in attributes["tiles"]]
        found = [list(map(torch.from_numpy, evaluator.run(None, context))) for evaluator in evaluators]
        joined_or_added = zip(zip(*found), zip(*places), attributes["sums"])
        return tuple((_summed([[p] for p in parts])[0] if add else _put(parts, boxes)).numpy()
                     for parts, boxes, add in joined_or_added)  # fmt: skip


def _put(parts: tuple[Tensor, ...], places: tuple) -> Tensor:
    """What the parts of all tiles make up: `places` are the boxes in each, and where they belong."""
    shape = list(parts[0].shape)
    for _, target in (boxes for place in places for boxes in place):
        for dim, _, stop in target:
            shape[dim] = max(shape[dim], stop)
    result = parts[0].new_empty(shape)
    for part, boxes in zip(parts, places):
        for source, target in boxes:
            narrowed(result, target).copy_(narrowed(part, source))
    return result
