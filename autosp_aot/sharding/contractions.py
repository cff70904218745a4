"""Products, reductions, lookups, normalisations and losses."""

import string

from autosp_aot.sharding.call import Call, Rule, Whole
from autosp_aot.sharding.spec import Linear, Spec, from_notation

LETTERS = string.ascii_lowercase


def notation(text: str, linear: Linear = (), contraction: bool = False) -> Rule:
    """A rule that is one line of factor notation."""

    def rule(call: Call) -> Spec:
        operands, results = ([v.shape for v in values] for values in (call.operands, call.results))
        return from_notation(text, operands, results, linear, contraction)

    return rule


def plus_product(left: str, right: str, product: str) -> Rule:
    """A product of two tensors, added to one that is broadcast to its shape: the factor summed over is whole."""

    def rule(call: Call) -> Spec:
        first = call.operands[0].shape
        letters = product[len(product) - len(first) :]
        word = "".join(letter if size != 1 else "1" for letter, size in zip(letters, first))
        shapes = [v.shape for v in call.operands]
        return from_notation(f"{word},{left},{right}->{product}", shapes, [call.results[0].shape], contraction=True)

    return rule


def triangular_solve(call: Call) -> Spec | None:
    """The solution of A x = b or, to the right, x A = b: what A's equations do not tie together is parallel.

    A: [.., n, n]   b, x: [.., n, k], to the right [.., k, n]
    """
    shapes = [value.shape for value in call.operands]
    if shapes[0][:-2] != shapes[1][:-2]:
        return None
    batch, left = LETTERS[: len(shapes[0]) - 2], dict(call.instr.kwargs).get("left", True)
    text = "{0}XY,{0}Yz->{0}Xz" if left else "{0}XY,{0}zX->{0}zY"
    return from_notation(text.format(batch), shapes, [call.results[0].shape], linear=((1,),), contraction=True)


def reduction(sums: bool, linear: bool) -> Rule:
    """A reduction over the dims of argument 1, which have to be whole unless it `sums`."""

    def rule(call: Call) -> Spec:
        shape = call.operands[0].shape
        dims, keep = _reduced(call)
        word = [LETTERS[d].upper() if d in dims and not sums else LETTERS[d] for d in range(len(shape))]
        left = [("1" if keep else "") if d in dims else word[d] for d in range(len(shape))]
        results = [v.shape for v in call.results]
        return from_notation(f"{''.join(word)}->{''.join(left)}", [shape], results, linear=((0,),) if linear else ())

    def _reduced(call: Call) -> tuple[set[int], bool]:
        shape, args = call.operands[0].shape, call.instr.args
        dims = args[1] if len(args) > 1 else None
        dims = (dims,) if isinstance(dims, int) else dims
        return {d % max(len(shape), 1) for d in dims or range(len(shape))}, len(args) > 2 and bool(args[2])

    return rule


def whole_dim(position: int, operands: int) -> Rule:
    """One dim (argument `position`) whole in `operands` tensors of the result's shape: softmax and its like."""

    def rule(call: Call) -> Spec:
        shape = call.results[0].shape
        dim = call.instr.args[position] % len(shape)
        word = "".join(LETTERS[d].upper() if d == dim else LETTERS[d] for d in range(len(shape)))
        shapes = [v.shape for v in call.operands]
        return from_notation(f"{','.join([word] * operands)}->{word}", shapes, [shape])

    return rule


def layer_norm(call: Call) -> Spec:
    shape, normalized = call.operands[0].shape, len(call.instr.args[1])
    word, lead = _norm_words(len(shape), normalized)
    tail = word[len(lead) :]
    words = [word] + [tail] * (len(call.operands) - 1)
    ones = lead + "1" * normalized
    return _several(words, [word, ones, ones], call)


def layer_norm_backward(call: Call) -> Spec:
    shape, normalized = call.operands[0].shape, len(call.instr.args[2])
    word, lead = _norm_words(len(shape), normalized)
    tail = word[len(lead) :]
    ones = lead + "1" * normalized
    words = [word, word, ones, ones] + [tail] * (len(call.operands) - 4)
    return _several(words, [word, tail, tail], call)


def _norm_words(dims: int, normalized: int) -> tuple[str, str]:
    lead = LETTERS[: dims - normalized]
    return lead + LETTERS[dims - normalized : dims].upper(), lead


def _several(words: list[str], results: list[str], call: Call) -> Spec:
    kept = [word for word, used in zip(results, call.results_by_position) if used]
    operands, made = ([value.shape for value in values] for values in (call.operands, call.results))
    return from_notation(f"{','.join(words)}->{','.join(kept)}", operands, made)


def embedding(call: Call) -> Spec:
    ids = LETTERS[: len(call.operands[1].shape)]
    return from_notation(f"Vz,{ids}->{ids}z", [v.shape for v in call.operands], [call.results[0].shape])


def embedding_backward(call: Call) -> Spec | None:
    ids = LETTERS[: len(call.operands[1].shape)]
    if call.instr.args[4]:  # scaled by how often a token occurs in the whole batch
        return None
    return from_notation(f"{ids}z,{ids}->Vz", [v.shape for v in call.operands], [call.results[0].shape])


def nll_loss(call: Call) -> Spec | None:
    """Sum of losses and sum of weights over rows; the mean is taken after both are whole."""
    reduction, weighted = call.instr.args[3], len(call.operands) == 3
    if reduction == 1:
        return None
    row = _row(call.operands[0])
    words = [(row if reduction == 0 else "", "")[at] for at in range(2) if call.results_by_position[at]]
    return from_notation(f"{row}C,{row}{',C' if weighted else ''}->{','.join(words)}",
                         [v.shape for v in call.operands], [v.shape for v in call.results])  # fmt: skip


def nll_loss_backward(call: Call) -> Spec:
    weighted, row = len(call.operands) == 5, _row(call.operands[1])
    grad = row if call.operands[0].shape else ""
    return from_notation(f"{grad},{row}C,{row}{',C' if weighted else ''},->{row}C",
                         [v.shape for v in call.operands], [call.results[0].shape])  # fmt: skip


def _row(scores: Whole) -> str:
    """The letter of the rows of scores [n, C]; none for the scores [C] of one."""
    return "n"[: len(scores.shape) - 1]


def histc(call: Call) -> Spec | None:
    """Counts add up, where the bins do not depend on the data."""
    if len(call.instr.args) < 4 or not call.instr.args[2] < call.instr.args[3]:
        return None
    shape = call.operands[0].shape
    return from_notation(f"{LETTERS[: len(shape)]}->Z", [shape], [call.results[0].shape])
