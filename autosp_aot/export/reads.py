"""What forward reads a value of a tensor for, told by the statement that does: each kind has a way out of its own.

    assert (labels < V).all()             an assertion         torch._assert_async
    if (labels >= V).any(): raise ...     an assertion
    self.log = loss.item()                a log                .detach()
    logits[mask]                          a boolean index      torch.where, and a sum
    x[: lengths.max()]                    a length             a mask
    if x.norm() > 1: x = x / 2            a branch             torch.where
    x[:, at]                              an element           torch.index_select
    x * x.norm().item()                   a number             the tensor itself
"""

import ast
import functools
import linecache
import re
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from autosp_aot.errors import Problem
from autosp_aot.export.user_code import frames_of_users, raised_at, users_traceback

aten = torch.ops.aten
# Calls that take sizes; what is given to them is a length.
SIZED = re.compile(
    r"(\.|^)(range|arange|zeros|ones|empty|full|rand|randn|view|reshape|expand|repeat|narrow|split|linspace|"
    r"repeat_interleave|unflatten|pad|new_\w+)$"
)
LOGS = re.compile(r"(\.|^)(print|log\w*|debug|info|warning|write|append|update|add_scalar\w*)$")
ASSERTIONS = re.compile(r"(\.|^)_(check|assert)\w*$")
READERS = re.compile(r"(\.|^)(item|tolist|bool|int|float|all|any)$")
INDICES = (aten.nonzero.default, aten.masked_select.default, aten.index.Tensor, aten.index_put_.default)

WHY = "one program serves all batches, and values of the batch are not known when it is built"
KINDS = {
    "assertion": ("an assertion reads a value of the batch", "assert it as torch._assert_async((labels < 100).all()), "
                  "which a program leaves out, or delete the line"),
    "log": ("a log reads a value of the batch", "keep the tensor, as in self.logged = loss.detach(), and read it after "
            "the step"),
    "boolean index": ("a boolean index makes a size of values of the batch", "compute all of it and weigh it by the "
                      "mask, as in (x * mask).sum() / mask.sum(); of labels set those to -100 that do not count"),
    "length": ("a size or a loop follows values of the batch", "compute the longest there can be, and mask what is "
               "beyond, as in torch.arange(S) < lengths[:, None]"),
    "branch": ("a branch depends on values of the batch", "compute both ways and choose, as in "
               "torch.where(x.norm() > 1, x / 2, x)"),
    "element": ("an element is picked by a value of the batch", "pick it with a tensor, as in "
                "x.index_select(1, at.view(1))"),
    "number": ("a number is taken from a tensor", "compute with the tensor itself, without .item() or float()"),
}  # fmt: skip


def read_problem(error: Exception, place: str) -> Problem:
    """What forward read, of an exception that reading raised; `place` is where forward begins."""
    what, fix = KINDS[_kind(error)]
    return Problem("data-dependent", what, raised_at(error) or place, WHY, fix)


def asserts(frame: FrameType | None) -> bool:
    """Whether .item() is read in a call of torch._check, torch._assert or the like, which nothing else depends on."""
    called = _calls(_running(frame))
    return any(map(ASSERTIONS.search, called)) and called[0].endswith(".item")


def reads_values(frame: FrameType | None) -> bool:
    """Whether that statement reads a value of a tensor."""
    return any(READERS.search(called) for node in _running(frame)[-1:] for called in _calls(ast.walk(node)))


def _running(frame: FrameType | None) -> list[ast.AST]:
    """The innermost of the user's expressions that are running and what is around it, up to its statement."""
    users = next(frames_of_users(frame), None)
    chain = _chain(users.f_code, users.f_lasti) if users is not None else []
    return chain[: next((at for at, node in enumerate(chain) if isinstance(node, ast.stmt)), len(chain)) + 1]


def _calls(nodes: Iterable[ast.AST]) -> list[str]:
    return [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]


def _kind(error: Exception) -> str:
    if isinstance(error, DynamicOutputShapeException):
        return "boolean index" if error.func in INDICES else "length"
    entry = users_traceback(error)
    return "number" if entry is None else _kind_of(_chain(entry.tb_frame.f_code, entry.tb_lasti))


def _kind_of(chain: list[ast.AST]) -> str:
    """What is read for: by what is around the expression that reads, the first of `chain`."""
    kind = "number"
    for inner, node in zip((None, *chain), chain):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Assert) or ASSERTIONS.search(called):
            return "assertion"
        if isinstance(node, (ast.If, ast.While, ast.IfExp)) and inner in (None, node.test):
            return _kind_of_branch(node)
        if isinstance(node, (ast.Slice, ast.For)) or SIZED.search(called):
            return "length"
        if isinstance(node, (ast.JoinedStr, ast.Expr)) or LOGS.search(called):
            return "log"
        if isinstance(node, ast.Subscript) and inner in (None, node.slice):
            return "element"
        if isinstance(node, ast.BoolOp) or isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            kind = "branch"
        if isinstance(node, ast.Assign):
            return _kind_of_name(node, chain) if isinstance(node.targets[0], ast.Name) else "log"
    return kind


def _kind_of_branch(node: ast.If | ast.While | ast.IfExp) -> str:
    """What a branch is for that does nothing but raise, or write to a log; else a branch."""
    body = node.body if isinstance(node, ast.If) and not node.orelse else []
    if body and all(isinstance(step, ast.Raise) for step in body):
        return "assertion"
    logs = [isinstance(step, ast.Expr) and any(map(LOGS.search, _calls([step.value]))) for step in body]
    return "log" if logs and all(logs) else "branch"


def _kind_of_name(assigned: ast.Assign, chain: list[ast.AST]) -> str:
    """What a name is used for that a value is assigned to: the first use that says so."""
    function = next((node for node in chain if isinstance(node, (ast.FunctionDef, ast.Lambda))), assigned)
    name = assigned.targets[0].id
    uses = (path[::-1] for path in _paths(function) if isinstance(path[-1], ast.Name) and path[-1].id == name)
    kinds = [_kind_of(path) for path in uses if assigned not in path]
    return next((kind for kind in kinds if kind not in ("number", "log")), kinds[0] if kinds else "number")


def _paths(node: ast.AST, outer: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, ...]]:
    """Every node below one, with all that is around it, the outermost first."""
    yield (*outer, node)
    for inner in ast.iter_child_nodes(node):
        yield from _paths(inner, (*outer, node))


def _chain(code: CodeType, instruction: int) -> list[ast.AST]:
    """The expression that an instruction of a function belongs to and what is around it, the innermost first."""
    line, last, column, end = list(code.co_positions())[instruction // 2]
    if None in (line, last, column, end):
        return []
    chain: list[ast.AST] = []
    for node in ast.walk(_parsed(code.co_filename)):
        if hasattr(node, "lineno") and (node.lineno, node.col_offset) <= (line, column):
            if (last, end) <= (node.end_lineno, node.end_col_offset):
                chain.insert(0, node)
    return chain


@functools.lru_cache(maxsize=8)
def _parsed(path: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return ast.Module([], [])
