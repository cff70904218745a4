"""no_grad and autocast as marks in one flat graph, so that every rewrite sees all of it.

    a = matmul(x, w)                                      x2, w2 = to(x, bf16), to(w, bf16)
    with autocast("cpu", bf16):                           mode = _enter_autocast("cpu", bf16, True, False)
        b = matmul(x, w)                              ->  b = matmul(x2, w2)
        with no_grad():                                   _set_grad_enabled(False)
            c = b + 1                                     c = add(b, 1)
                                                          _set_grad_enabled(True)
                                                          _exit_autocast(mode)

torch.export traces these marks, then makes nested graphs of what stands between, and forgets no_grad inside autocast
(torch 2.13). Here the marks stay, and `Flat` runs them.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass
from torch.fx import Graph, Interpreter, Node

from autosp_aot.export.attention.products import made
from autosp_aot.export.complex import Complex, called, concerned, memory_of, refuse_written
from autosp_aot.export.source import where

aten = torch.ops.aten
SET_GRAD = torch._C._set_grad_enabled
ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
MARKS = (SET_GRAD, ENTER, EXIT)
# Of the operators that autocast gives its dtype, those that become part of another operator.
REPLACED = (
    aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.baddbmm.default,
)  # fmt: skip


@contextlib.contextmanager
def flat_regions() -> Iterator[None]:
    """While it holds, torch.export leaves the marks in its graph."""
    with contextlib.ExitStack() as undo:
        for module in (replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass):
            name = module.__name__.rpartition(".")[2]
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, lambda graph_module, signature: (graph_module, signature))
        yield


def without_gradients(graph: Graph) -> set[Node]:
    """The nodes that run while gradients are off."""
    found, enabled = set(), True
    for node in graph.nodes:
        if node.target is SET_GRAD:
            (enabled,) = node.args
        elif not enabled:
            found.add(node)
    return found


def spell_casts(graph: Graph) -> None:
    """Write out, in place, the casts of operators that rewrites replace: autocast goes by operator."""
    regions = []
    for node in list(graph.nodes):
        if node.target is ENTER:
            regions.append(node.args)
        elif node.target is EXIT:
            regions.pop()
        elif node.target in REPLACED:
            _, dtype, enabled, _ = next((r for r in reversed(regions) if r[0] == "cpu"), ("cpu", None, False, False))
            for operand in node.all_input_nodes if enabled else ():
                value = operand.meta["val"]
                if value.dtype in (torch.float32, torch.float16, torch.bfloat16) and value.dtype is not dtype:
                    with graph.inserting_before(node):
                        cast = made(graph, aten.to.dtype, (operand, dtype), value.to(dtype), node)
                    node.replace_input_with(operand, cast)


class Flat(Interpreter):
    """Runs a flat graph node by node, complex values as pairs; where one fails, the regions around it are left."""

    def run_node(self, node: Node):
        self.place = where(node).source
        refuse_written(node, self.complex_memory, self.place)
        result = super().run_node(node)
        if isinstance(result, Complex):
            self.complex_memory.add(memory_of(node))
        return result

    def call_function(self, target, args, kwargs):
        if concerned(target, args, kwargs):
            return called(target, args, kwargs, self.place)
        return super().call_function(target, args, kwargs)

    def run(self, *args):
        self.complex_memory: set[Node] = set()
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            try:
                return super().run(*args)
            finally:
                for node in reversed(self.graph.nodes):
                    if node.target is ENTER and node in self.env:
                        EXIT(self.env[node])
