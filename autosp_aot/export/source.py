"""Where a captured node came from: the user's file and line, and the module path."""

import os
import re

import torch
from torch.fx import Node

from autosp_aot.program import Where

_TORCH = os.path.dirname(torch.__file__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
PREFIX = "model."


def where(node: Node) -> Where:
    """The innermost frame outside of torch as `file.py:line`, and the path of the module that ran it."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith((_TORCH, "<"))]
    source = f"{os.path.basename(frames[-1][0])}:{frames[-1][1]}" if frames else ""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return Where(source, module_path(paths[-1]) if paths else "")


def module_path(name: str) -> str:
    """A name inside the wrapper that keeps only the loss, as the user's model has it."""
    return "" if name + "." == PREFIX else name.removeprefix(PREFIX)
