"""Attention in canonical form: every scaled_dot_product_attention of the exported graph becomes `autosp.attention`.

    mask = keys <= rows                 [1, 1, S, S]        gone: causal=True
    k2 = repeat every k head 4 times    [B, 4 * Nkv, S, D]  gone: the operator reads k itself
    out = scaled_dot_product_attention(q, k2, v2, attn_mask=mask)
      ->
    out, lse = autosp.attention(q, k, v, scale, causal=True)
"""

import math
import operator

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export import attention_op  # noqa: F401  (defines torch.ops.autosp)
from autosp_aot.export.masks import constants_of, evaluate, says_all, says_causal, written
from autosp_aot.export.source import where

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

# Operators that only move, repeat or rename elements, and can stand between a key/value head and its repetition.
MOVES = (
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default,
    aten.clone.default, aten.contiguous.default, aten.slice.Tensor, aten.repeat_interleave.self_int,
    aten.flatten.using_ints,
)  # fmt: skip


def canonical_attention(exported: ExportedProgram) -> None:
    """Rewrite every attention of the exported graph in place. Raises BuildError naming all that cannot be."""
    problems, graph, known = [], exported.graph, constants_of(exported)
    dirty = written(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is SDPA:
            problem = _rewrite(graph, node, known, dirty)
            if problem:
                problems.append(problem)
    if problems:
        raise BuildError(*dict.fromkeys(problems))
    graph.eliminate_dead_code()


def _rewrite(graph: Graph, node: Node, known: dict, dirty: set[Node]) -> Problem | None:
    names = [argument.name for argument in SDPA._schema.arguments]
    arguments = SDPA._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip(names, node.args)) | node.kwargs
    q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    causal, place = given["is_causal"], where(node)
    if given["dropout_p"]:
        what = f"attention with dropout {given['dropout_p']} is not supported"
        return Problem("attention-dropout", what, place.source,
                       "its draws would have to be the same at every number of ranks", "set the attention dropout to 0")
    if mask is not None:
        said = evaluate(mask, known)
        if says_causal(said):
            causal = True
        elif not says_all(said):
            return _mask_problem(mask, place.source)
    if q.meta["val"].dim() != 4:
        return Problem("attention-shape", f"attention over {q.meta['val'].dim()} dims is not supported", place.source,
                       "the canonical operator is [batch, heads, sequence, head dim]", "add the missing dims")
    heads, group = q.meta["val"].shape[1], 1
    if given["enable_gqa"]:
        group = heads // k.meta["val"].shape[1]
    else:
        (k, k_group), (v, v_group) = _before_repetition(k, dirty), _before_repetition(v, dirty)
        if k_group != v_group:
            k, v = node.args[1], node.args[2]
        else:
            group = k_group
    shapes = [tuple(t.meta["val"].shape) for t in (q, k, v)]
    if shapes[1][1] == shapes[2][1] == 1:
        group = heads
    problem = _shape_problem(shapes, group, causal, place.source)
    if problem:
        return problem
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(q.meta["val"].shape[-1])
    with graph.inserting_before(node):
        pair = graph.call_function(torch.ops.autosp.attention.default, (q, k, v, float(scale), bool(causal)))
        out = graph.call_function(operator.getitem, (pair, 0))
    pair.meta = {key: value for key, value in node.meta.items() if key != "val"}
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return None


def _shape_problem(shapes: list[tuple[int, ...]], group: int, causal: bool, place: str) -> Problem | None:
    """What the operator cannot take: dims that eager would broadcast, and a causal corner that kernels disagree on."""
    q, k, v = shapes
    if q[0] != k[0] or k[:3] != v[:3] or q[1] != group * k[1] or q[3] != k[3]:
        what = f"attention over q {list(q)}, k {list(k)}, v {list(v)} is not supported"
        return Problem("attention-shape", what, place,
                       "batch, heads and keys have to agree as they are; only key/value heads may be repeated",
                       "expand k and v to the batch and the heads of q")
    if causal and q[2] != k[2]:
        what = f"causal attention of {q[2]} queries over {k[2]} keys is not supported"
        return Problem("attention-shape", what, place,
                       "kernels differ in which keys the first query sees", "give as many queries as keys")
    return None


def _mask_problem(mask: Node, place: str) -> Problem:
    val = mask.meta["val"]
    size = val.numel() * val.element_size()
    made = where(mask).source
    return Problem(
        "mask-not-recognised",
        f"the attention mask is not recognised; as a tensor of every query and key it takes {size} bytes",
        f"scaled_dot_product_attention ({place})" + (f"; mask made at {made}" if made else ""),
        "it is not known to be causal from comparisons of positions, tril or triu made in forward",
        "use is_causal=True, or make the causal mask in forward",
    )


def _before_repetition(node: Node, dirty: set[Node]) -> tuple[Node, int]:
    """The tensor [B, Nkv, S, D] whose heads `node` repeats, and how often; the node itself and 1 where it does not."""
    chain = [node]
    while chain[-1].op == "call_function" and chain[-1].target in MOVES and chain[-1] not in dirty:
        chain.append(chain[-1].args[0])
    for start in range(1, len(chain)):
        source = chain[start]
        if source.meta["val"].dim() == 4:
            dims = _follow(chain[:start][::-1], source)
            own = [[dim] if size > 1 else [] for dim, size in enumerate(source.meta["val"].shape)]
            if dims is not None and [dims[0], dims[1][:-1], *dims[2:]] == own and dims[1][-1:] not in ([], [1]):
                return source, node.meta["val"].shape[1] // source.meta["val"].shape[1]
    return node, 1


def _follow(chain: list[Node], source: Node) -> list[list] | None:
    """Each dim of the chain's end as the list of what it consists of: dims of the source (numbers) and repeats ("x4").

    Dims of size one are left out.
    """
    dims = [[dim] if size > 1 else [] for dim, size in enumerate(source.meta["val"].shape)]
    sizes = dict(enumerate(source.meta["val"].shape))
    for node in chain:
        before, shape = node.args[0].meta["val"].shape, node.meta["val"].shape
        if node.target is aten.unsqueeze.default:
            at = node.args[1] % len(shape)
            dims.insert(at, [])
        elif node.target is aten.expand.default:
            for dim, (old, new) in enumerate(zip(before, shape)):
                if old != new:
                    dims[dim] = [f"x{len(sizes)}"]
                    sizes[f"x{len(sizes)}"] = new
        elif node.target is aten.repeat_interleave.self_int:
            if len(node.args) < 3:
                return None
            at = node.args[2] % len(shape)
            dims[at] = [*dims[at], f"x{len(sizes)}"]
            sizes[f"x{len(sizes)}"] = node.args[1]
        elif node.target is aten.slice.Tensor:
            if before != shape:
                return None
        elif before != shape:
            dims = _regroup([atom for dim in dims for atom in dim], sizes, shape)
            if dims is None:
                return None
    return dims


def _regroup(atoms: list, sizes: dict, shape: tuple[int, ...]) -> list[list] | None:
    """Deal the atoms out over the dims of a reshape; None where a dim would have to cut an atom."""
    dims, left = [], list(atoms)
    for size in shape:
        dim, got = [], 1
        while got < size and left:
            got *= sizes[left[0]]
            dim.append(left.pop(0))
        if got != size:
            return None
        dims.append(dim)
    return None if left else dims
