"""What cannot be captured exactly, found and said: data-dependent code, unknown operators, mutation, lost gradients."""

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.autograd.graph import Node
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.reads import read_problem
from autosp_aot.export.regions import MARKS
from autosp_aot.export.source import module_path, where
from autosp_aot.export.user_code import FAILURES, raised_at, said
from autosp_aot.ops.experts.captured import PRODUCTS

GROUPED = """sort topk's indices, count them with torch.histc, let nothing see that order but its inverse; or
multiply with weight[ids] in torch operators (transformers: experts_implementation="batched_mm")"""
DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
NAMESPACES = ("aten", "autosp", "prims")


@contextlib.contextmanager
def diagnosed(place: str) -> Iterator[None]:
    """While it holds, what torch or the model raises is a BuildError with the line of it; else `place`."""
    try:
        yield
    except DATA_DEPENDENT as error:
        raise BuildError(read_problem(error, place)) from error
    except UnsupportedOperatorException as error:
        raise BuildError(_unknown(str(error.func), raised_at(error) or place)) from error
    except FAILURES as error:
        if "data is not allocated yet" in str(error):  # as torch.tensor says of tensors without values
            raise BuildError(read_problem(error, place)) from error
        raise BuildError(
            Problem(
                "capture-failed",
                "the step cannot be captured",
                raised_at(error) or place,
                said(error),
                "correct that line; if forward(**example_batch) runs in Python, write it with torch operators",
            )
        ) from error


def refuse_operators(exported: ExportedProgram, model: nn.Module) -> None:
    """BuildError naming every operator we cannot see into, and every value of `model` read past autograd."""
    problems = []
    for node in exported.graph.nodes:
        if node.op == "call_function" and not _known(node.target):
            name = node.target.__name__ if inspect.isroutine(node.target) else str(node.target)
            problems.append(_unknown(name, where(node).source))
    objects = exported.graph_signature.inputs_to_lifted_custom_objs
    for node in exported.graph.nodes:
        if any(operand.name in objects for operand in node.all_input_nodes):
            problems.append(
                Problem(
                    "random-operator",
                    f"{node.target} draws from a generator of its own",
                    where(node).source,
                    "its state outlives the step",
                    "leave the generator out: draws follow from the run's seed and the number of the step",
                )
            )
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for node in exported.graph.nodes:
        value = exported.constants.get(lifted.get(node.name))
        if node.users and isinstance(value, FakeTensor) and value.untyped_storage()._cdata not in parameters:
            problems.append(
                Problem(
                    "data-dependent",
                    "a computed tensor becomes a constant",
                    where(next(iter(node.users))).source,
                    "torch.export does not follow a tensor read with .data",
                    "use .detach() instead of .data",
                )
            )
    if problems:
        raise BuildError(*dict.fromkeys(problems))


WAYS_OUT = {
    "parameter": "compute with a changed copy, as in weight.clamp(-1, 1), or change it between the steps",
    "buffer": "compute it anew in each step, or leave it out, as with track_running_stats=False in a batch norm",
    "batch": "change a copy of it, as in labels = labels.clone()",
}


def refuse_mutation(changed: Mapping[str, str]) -> None:
    """BuildError naming what a step changes beyond its end, as `buffer 'count'`, each with the line that does."""
    if changed:
        raise BuildError(
            *(
                Problem(
                    "state-mutated",
                    f"the step changes {what}",
                    place,
                    "state that outlives the step is not part of the program",
                    WAYS_OUT.get(what.partition(" ")[0], WAYS_OUT["buffer"]),
                )
                for what, place in changed.items()
            )
        )


def refuse_other_gradients(loss: Tensor, model: nn.Module, captured: set[str], place: str) -> None:
    """BuildError unless the parameters with a gradient in eager are those named in `captured`.

    `loss` is what eager computed of the parameters of `model`: its autograd graph is walked.
    """
    reached = _leaves(loss)
    eager = {module_path(name) for name, parameter in model.named_parameters() if id(parameter) in reached}
    problems = [
        Problem(
            "gradient-lost",
            f"parameter {name!r} has a gradient in eager and none in the captured step",
            place,
            "capture lost the way from the parameter to the loss",
            "compute the loss with torch operators on tensors",
        )
        for name in sorted(eager - captured)
    ] + [
        Problem(
            "gradient-gained",
            f"parameter {name!r} has no gradient in eager and one in the captured step",
            place,
            "capture does not see what keeps the gradient away",
            "use torch.no_grad() or .detach()",
        )
        for name in sorted(captured - eager)
    ]
    if problems:
        raise BuildError(*problems)


def sparse_problem(target: object, place: str) -> Problem:
    """Of an operator that makes a tensor that is not dense."""
    return Problem(
        "layout-unsupported",
        f"{target} makes a sparse tensor",
        place,
        "programs have dense tensors only",
        "compute it with dense tensors: sparse=False in an embedding",
    )


def _known(target: Callable) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in NAMESPACES and str(target) not in PRODUCTS
    return target in MARKS or getattr(operator, target.__name__, None) is target


def _unknown(name: str, place: str) -> Problem:
    return Problem(
        "operator-unknown",
        f"{name} is not an operator we can see into",
        place,
        "its effect on a part of the sequence is unknown",
        "write it with torch operators" if name not in PRODUCTS else GROUPED,
    )


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the tensors in which the autograd graph of the loss ends."""
    ends = (step for step in backward_of(loss) if step.name() == "torch::autograd::AccumulateGrad")
    return {id(step.variable) for step in ends}  # type: ignore[attr-defined]  # what torch declares is any step


def backward_of(loss: Tensor) -> Iterator[Node]:
    """The steps of its backward, in no order."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        step = todo.pop()
        if step is not None and step not in seen:
            seen.add(step)
            todo += [before for before, _ in step.next_functions]
            yield step
