"""What forward reads a value of a tensor for, told by the statement that does: each kind has a way out of its own.

    assert (labels < V).all()             an assertion         torch._assert_async
    if (labels >= V).any(): raise ...     an assertion
    self.log = loss.item()                a log                .detach()
    logits[mask]                          a boolean index      torch.where, and a sum
    x[: lengths.max()]                    a length             a mask
    max(n, 1), of a tensor n              a comparison         .clamp
    torch.bincount(ids)                   a count              one_hot, and a sum
    x.repeat_interleave(n)                repeats              output_size
    torch.tensor([a, b]), of tensors      a tensor of tensors  torch.stack
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
from autosp_aot.export.user_code import called_at, frames_of_users, raised_at, users_traceback

aten = torch.ops.aten
# Calls that take sizes; what is given to them is a length.
SIZED = re.compile(
    r"(\.|^)(range|arange|zeros|ones|empty|full|rand|randn|view|reshape|expand|repeat|narrow|split|linspace|"
    r"repeat_interleave|unflatten|pad|new_\w+)$"
)
LOGS = re.compile(
    r"^(?!(math|np|numpy|torch|F)\.)(.*\.)?(print|log(_(metrics?|scalars?|dict|loss))?|debug|info|warn|warning|warn_once|"
    r"warning_once|error|exception|critical|write|append|update|add_scalar\w*|format)$"
)
IN_PLACE = re.compile(r"\.\w*[a-z]_$")
MAKES_TENSOR = re.compile(r"(\.|^)(tensor|as_tensor)$")
ASSERTIONS = re.compile(r"(\.|^)_(check|assert)\w*$")
READERS = re.compile(r"(\.|^)(item|tolist|bool|int|float|all|any)$")
# Operators whose results are as large as values say.
SIZES: dict[object, str] = {
    **dict.fromkeys((aten.nonzero, aten.masked_select, aten.index, aten.index_put_), "boolean index"),
    aten.bincount: "count", aten.repeat_interleave: "repeats",
}  # fmt: skip

WHY = "one program serves all batches, and values of the batch are not known when it is built"
PURPOSES = {
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
    "comparison": ("max or min compares values of the batch", "compare in torch, as in x.sum().clamp(min=1), "
                   "torch.maximum or torch.minimum"),
    "count": ("a count is as long as the largest value of the batch", "count all that there can be, as in "
              "one_hot(ids, V).flatten(0, -2).sum(0)"),
    "repeats": ("repeats follow values of the batch", "say how many there are in all, as in "
                "x.repeat_interleave(n, 0, output_size=8)"),
    "tensor of tensors": ("a tensor is made of values of tensors", "join the tensors, as in torch.stack((a, b))"),
    "element": ("an element is picked by a value of the batch", "pick it with a tensor, as in "
                "x.index_select(1, at.view(1))"),
    "number": ("a number is taken from a tensor", "compute with the tensor itself, without .item() or float()"),
}  # fmt: skip


def read_problem(error: Exception, place: str) -> Problem:
    """What forward read, of an exception that reading raised; `place` is where forward begins."""
    return _problem(_kind(error), raised_at(error) or place)


def read_here(frame: FrameType) -> Problem:
    """What forward reads at a frame, or at one that called it."""
    users = next(frames_of_users(frame), None)
    return _problem(_kind_of(_chain(users.f_code, users.f_lasti)) if users else "number", called_at())


def _problem(kind: str, place: str) -> Problem:
    what, fix = PURPOSES[kind]
    return Problem("data-dependent", what, place, WHY, fix)


def asserts(frame: FrameType | None) -> bool:
    """Whether .item() is read in a call of torch._check, torch._assert or the like, which nothing else depends on."""
    called = _calls(_running(frame))
    asserting = [name for name in called if ASSERTIONS.search(name) and _is_torchs(name, next(frames_of_users(frame)))]
    return bool(asserting) and called[0].endswith(".item")


def _is_torchs(name: str, frame: FrameType) -> bool:
    """Whether a dotted name is one of torch's functions where a frame runs."""
    first, *rest = name.split(".")
    found = frame.f_locals.get(first, frame.f_globals.get(first))
    for part in rest:
        found = getattr(found, part, None)
    return (getattr(found, "__module__", None) or "").partition(".")[0] == "torch"


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
        return SIZES.get(getattr(error.func, "overloadpacket", None), "length")
    entry = users_traceback(error)
    return "number" if entry is None else _kind_of(_chain(entry.tb_frame.f_code, entry.tb_lasti))


def _kind_of(chain: list[ast.AST], assignments: tuple[ast.AST, ...] = ()) -> str:  # noqa: C901  (a table, row by row)
    """What is read for: by what is around the expression that reads, the first of `chain`.

    `assignments` are those whose name's uses have led here.
    """
    kind = "number"
    for inner, node in zip((None, *chain), chain):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Assert) or ASSERTIONS.search(called):
            return "assertion"
        if isinstance(node, (ast.If, ast.While, ast.IfExp)) and inner in (None, node.test):
            return _kind_of_branch(node)
        if isinstance(node, ast.Match):
            return "branch"
        if inner is None and called in ("max", "min"):
            return "comparison"
        if inner is None and MAKES_TENSOR.search(called):
            return "tensor of tensors"
        if isinstance(node, (ast.Slice, ast.For)) or SIZED.search(called):
            return "length"
        if isinstance(node, ast.Subscript) and inner in (None, node.slice):
            bounds = (part for part in ast.walk(node.slice) if isinstance(part, ast.Slice))
            return "length" if any(part.lower or part.upper for part in bounds) else "element"
        if IN_PLACE.search(called):
            return "number"
        if isinstance(node, (ast.JoinedStr, ast.Expr)) or LOGS.search(called):
            return "log"
        if isinstance(node, ast.BoolOp) or isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            kind = "branch"
        if isinstance(node, ast.Dict) and any(isinstance(outer, ast.Return) for outer in chain):
            return "log"
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            if isinstance(target, ast.Name) and node not in assignments:
                return _kind_of_name(target.id, chain, (*assignments, node))
            return "log" if isinstance(target, (ast.Attribute, ast.Subscript)) else kind
    return kind


def _kind_of_branch(node: ast.If | ast.While | ast.IfExp) -> str:
    """What a branch is for that does nothing but raise, or write to a log; else a branch."""
    body = node.body if isinstance(node, ast.If) and not node.orelse else []
    logs = [isinstance(step, ast.Expr) and any(map(LOGS.search, _calls([step.value]))) for step in body]
    if body and isinstance(body[-1], ast.Raise) and all(logs[:-1]):
        return "assertion"
    return "log" if logs and all(logs) else "branch"


def _kind_of_name(name: str, chain: list[ast.AST], assignments: tuple[ast.AST, ...]) -> str:
    """What a name is used for that a value is assigned to: the first use that says so."""
    function = next((node for node in chain if isinstance(node, (ast.FunctionDef, ast.Lambda))), assignments[-1])
    paths = (path[::-1] for path in _paths(function) if _reads(path[-1], name))
    kinds = [_kind_of(list(path), assignments) for path in paths if not set(assignments) & set(path)]
    return next((kind for kind in kinds if kind not in ("number", "log")), kinds[0] if kinds else "number")


def _paths(node: ast.AST, outer: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, ...]]:
    """Every node below one, with all that is around it, the outermost first."""
    yield (*outer, node)
    for inner in ast.iter_child_nodes(node):
        yield from _paths(inner, (*outer, node))


def _reads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _chain(code: CodeType, instruction: int) -> list[ast.AST]:
    """The expression that an instruction of a function belongs to and what is around it, the innermost first."""
    line, last, column, end = list(code.co_positions())[instruction // 2]
    if None in (line, last, column, end):
        return []
    chain: list[ast.AST] = []
    for node in ast.walk(_parsed(code.co_filename)):
        at = [getattr(node, name, None) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")]
        if None not in at and at[:2] <= [line, column] and [last, end] <= at[2:]:
            chain.insert(0, node)
    return chain


@functools.lru_cache(maxsize=8)
def _parsed(path: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return ast.Module([], [])
