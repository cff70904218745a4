"""Where a captured node came from: the user's file and line, and the module path."""

from torch.fx import Node

from autosp_aot.export.user_code import traced_at
from autosp_aot.ir.program import Where

PREFIX = "model."


def where(node: Node) -> Where:
    """The innermost of the user's lines as `file.py:line`, and the path of the module that ran it."""
    source = traced_at(node.meta.get("stack_trace") or "")
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return Where(source, module_path(paths[-1]) if paths else "")


def module_path(name: str) -> str:
    """A name inside the wrapper that keeps only the loss, as the user's model has it."""
    return "" if name + "." == PREFIX else name.removeprefix(PREFIX)
