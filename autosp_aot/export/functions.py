"""The user's autograd.Functions as calls in the exported graph, so that it is their own backward that is captured.

torch.export traces through `apply`, and what it keeps is forward alone. The tensors that go in and come out are marked
while it does, and what lies between becomes the call again; joint autograd then runs it, backward included.

    m = mark([x], 0, False)[0]
    s = sigmoid(m)                   ->      y = call_0(x)[0]
    y = mark([m * s], 0, True)[0]
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.replaced import replaced_code
from autosp_aot.export.user_code import called_at


@torch.library.custom_op("autosp::mark", mutates_args=())
def mark(tensors: list[Tensor], call: int, result: bool) -> list[Tensor]:
    raise AssertionError("captured on fake tensors only")


@mark.register_fake
def _(tensors, call, result):
    return [torch.empty_like(tensor) for tensor in tensors]


MARK = torch.ops.autosp.mark.default
APPLY = vars(torch.autograd.Function)["apply"].__func__


@dataclass(frozen=True)
class FunctionCall:
    """One `apply` of a Function: its arguments as they were given, and the line."""

    function: type[torch.autograd.Function]
    args: tuple
    place: str

    def again(self) -> Callable[..., list[Tensor]]:
        """The call as a function from the tensors among its arguments to those among its results."""

        def call(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            args = [next(left) if isinstance(arg, Tensor) else arg for arg in self.args]
            return _tensors(APPLY(self.function, *args))  # a class may have an apply of its own around it

        return call

    def problem(self, why: str) -> Problem:
        what = f"the autograd.Function {self.function.__name__} {why}"
        return Problem("custom-gradient", what, self.place, "its backward cannot be captured as a function of tensors",
                       "give it every tensor as an argument, save those it needs, and write to none")  # fmt: skip


@contextlib.contextmanager
def marked_functions() -> Iterator[list[FunctionCall]]:
    """While it holds, what users' Functions take and give is marked; the calls, in order."""
    calls: list[FunctionCall] = []

    def apply(torchs, function, *args, **kwargs):
        if function.__module__.partition(".")[0] == "torch":
            return torchs(function, *args, **kwargs)
        number, call = len(calls), FunctionCall(function, args, called_at())
        if any(isinstance(leaf, Tensor) for arg in args if not isinstance(arg, Tensor) for leaf in tree_leaves(arg)):
            raise BuildError(call.problem("is given a tensor inside of an argument"))
        calls.append(call)
        taken = iter(mark(_tensors(args), number, False))
        args = tuple(next(taken) if isinstance(arg, Tensor) else arg for arg in args)
        versions = [tensor._version for tensor in _tensors(args)]
        results = torchs(function, *args, **kwargs)
        if versions != [tensor._version for tensor in _tensors(args)]:
            raise BuildError(call.problem("writes to its arguments"))
        given = iter(mark(_tensors(results), number, True))
        if isinstance(results, Tensor):
            return next(given)
        return tuple(next(given) if isinstance(result, Tensor) else result for result in results)

    with replaced_code({APPLY: apply}):
        yield calls


def _tensors(values) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [value for value in values if isinstance(value, Tensor)]


def restore_functions(exported: ExportedProgram, calls: list[FunctionCall]) -> None:
    """Put the calls back into the graph, in place. BuildError for each that reads a tensor that is not its argument."""
    graph, problems = exported.graph, []
    literals = exported.graph_signature.inputs_to_lifted_tensor_constants
    known = {name for name, held in literals.items() if not isinstance(exported.constants[held], FakeTensor)}
    marks = {node.args[1:]: node for node in graph.nodes if node.target is MARK}
    for number, call in enumerate(calls):
        taken, given = marks.get((number, False)), marks.get((number, True))
        if given is None:
            continue
        if _reads_others(given, taken, known):
            problems.append(call.problem("reads a tensor that is not its argument"))
            continue
        _restore(graph, taken.args[0] if taken else [], given, call)
    if problems:
        raise BuildError(*dict.fromkeys(problems))
    graph.eliminate_dead_code()


def _reads_others(given: Node, taken: Node | None, known: set[str]) -> bool:
    """True where a result is computed from an input of the step, none of `known`, otherwise than through arguments."""
    todo, seen = list(given.all_input_nodes), set()
    while todo:
        node = todo.pop()
        if node.op == "placeholder" and node.name not in known:
            return True
        if node is not taken and node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _restore(graph: Graph, operands: list[Node], given: Node, call: FunctionCall) -> None:
    with graph.inserting_before(given):
        node = graph.call_function(call.again(), tuple(operands))
        node.meta = {key: value for key, value in given.args[0][0].meta.items() if key != "val"}
        for part in list(given.users):
            result = graph.call_function(operator.getitem, (node, part.args[1]))
            result.meta = {**node.meta, "val": part.meta["val"]}
            part.replace_all_uses_with(result)
            graph.erase_node(part)
    graph.erase_node(given)
