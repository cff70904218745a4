"""Which operators a program may name, and torch's operator for a name.

Allowed are ATen operators without side effects: none that writes to an operand, none that draws random numbers, and
none without a tensor operand except the constant tensors below. `autosp.uniform` draws, from the seed it is given.
Everything else is refused by name.
"""

import torch

FACTORIES = frozenset({
    "aten.arange.start_step", "aten.full.default", "aten.ones.default", "aten.scalar_tensor.default",
    "aten.zeros.default",
})  # fmt: skip
# Operators that make a tensor on the rank's device.
MAKE = FACTORIES | {"autosp.uniform"}
OURS = {
    "autosp.attention": "autosp.attention(q, k, v, scale, causal, group, first_head) -> (out, lse)",
    "autosp.attention_backward": "autosp.attention_backward(grad_out, q, k, v, out, lse, scale, causal, group,"
    " first_head) -> (grad_q, grad_k, grad_v)",
    "autosp.attention_rows": "autosp.attention_rows(q, k, v, scale, causal, group, rows, start) -> (out, lse)",
    "autosp.attention_rows_backward": "autosp.attention_rows_backward(grad_out, q, k, v, out, lse, scale, causal,"
    " group, rows, start) -> (grad_q, grad_k, grad_v)",
    "autosp.expert_mm": "autosp.expert_mm(ids, x, weight) -> y",
    "autosp.expert_mm_weight_grad": "autosp.expert_mm_weight_grad(ids, x, grad, experts) -> grad_weight",
    "autosp.uniform": "autosp.uniform(seed, site, shape, box, dtype) -> draws",
}
MOVES = ("shard", "all_to_all", "all_gather", "reduce_scatter", "all_reduce")
COLLECTIVES = MOVES[1:]
FREE = "free"


def overload(name: str) -> torch._ops.OpOverload | None:
    """Torch's operator for `aten.<operator>.<overload>`; None where there is none or it is not allowed."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        return None
    packet = getattr(torch.ops.aten, parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or parts[2] not in packet.overloads():
        return None
    found = getattr(packet, parts[2])
    return found if _pure(found) and (name in FACTORIES or _reads_tensor(found)) else None


def schema(name: str) -> str | None:
    """The signature of an allowed operator; None for one that is not."""
    if name in OURS:
        return OURS[name]
    found = overload(name)
    return None if found is None else str(found._schema)


def _pure(found: torch._ops.OpOverload) -> bool:
    returns_tensors = all("Tensor" in str(result.type) for result in found._schema.returns)
    return not found._schema.is_mutable and returns_tensors and torch.Tag.nondeterministic_seeded not in found.tags


def _reads_tensor(found: torch._ops.OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in found._schema.arguments)
