"""Products, reductions, lookups, normalisations and losses."""

import string

from autosp_aot.passes.rules.spec import Spec, from_notation

LETTERS = string.ascii_lowercase


def notation(text: str, **more):
    """A rule that is one line of factor notation."""

    def rule(call) -> Spec:
        return from_notation(text, [v.shape for v in call.operands], [v.shape for v in call.results], **more)

    return rule


def addmm(call) -> Spec:
    bias = call.operands[0].shape
    word = "".join(letter if size != 1 else "1" for letter, size in zip("ij"[2 - len(bias) :], bias))
    shapes = [v.shape for v in call.operands]
    return from_notation(f"{word},iK,Kj->ij", shapes, [call.results[0].shape], contraction=True)


def reduction(sums: bool, linear: bool):
    """A reduction over the dims of argument 1, which have to be whole unless it `sums`."""

    def rule(call) -> Spec:
        shape = call.operands[0].shape
        dims, keep = _reduced(call)
        word = [LETTERS[d].upper() if d in dims and not sums else LETTERS[d] for d in range(len(shape))]
        left = [("1" if keep else "") if d in dims else word[d] for d in range(len(shape))]
        results = [v.shape for v in call.results]
        return from_notation(f"{''.join(word)}->{''.join(left)}", [shape], results, linear=((0,),) if linear else ())

    def _reduced(call) -> tuple[set[int], bool]:
        shape, args = call.operands[0].shape, call.instr.args
        dims = args[1] if len(args) > 1 else None
        dims = (dims,) if isinstance(dims, int) else dims
        return {d % len(shape) for d in dims or range(len(shape))}, len(args) > 2 and bool(args[2])

    return rule


def whole_dim(position: int, operands: int):
    """One dim (argument `position`) whole in `operands` tensors of the result's shape: softmax and its like."""

    def rule(call) -> Spec:
        shape = call.results[0].shape
        dim = call.instr.args[position] % len(shape)
        word = "".join(LETTERS[d].upper() if d == dim else LETTERS[d] for d in range(len(shape)))
        shapes = [v.shape for v in call.operands]
        return from_notation(f"{','.join([word] * operands)}->{word}", shapes, [shape])

    return rule


def layer_norm(call) -> Spec:
    shape, normalized = call.operands[0].shape, len(call.instr.args[1])
    word, lead = _norm_words(len(shape), normalized)
    tail = word[len(lead) :]
    words = [word] + [tail] * (len(call.operands) - 1)
    ones = lead + "1" * normalized
    results = [call.results_by_position[at] and (word, ones, ones)[at] for at in range(3)]
    return _several(words, results, call)


def layer_norm_backward(call) -> Spec:
    shape, normalized = call.operands[0].shape, len(call.instr.args[2])
    word, lead = _norm_words(len(shape), normalized)
    tail = word[len(lead) :]
    ones = lead + "1" * normalized
    words = [word, word, ones, ones] + [tail] * (len(call.operands) - 4)
    results = [call.results_by_position[at] and (word, tail, tail)[at] for at in range(3)]
    return _several(words, results, call)


def _norm_words(dims: int, normalized: int) -> tuple[str, str]:
    lead = LETTERS[: dims - normalized]
    return lead + LETTERS[dims - normalized : dims].upper(), lead


def _several(words: list[str], results: list, call) -> Spec:
    kept = [word for word in results if word]
    operands, results = ([value.shape for value in values] for values in (call.operands, call.results))
    return from_notation(f"{','.join(words)}->{','.join(kept)}", operands, results)


def embedding(call) -> Spec:
    ids = LETTERS[: len(call.operands[1].shape)]
    return from_notation(f"Vz,{ids}->{ids}z", [v.shape for v in call.operands], [call.results[0].shape])


def embedding_backward(call) -> Spec | None:
    ids = LETTERS[: len(call.operands[1].shape)]
    if call.instr.args[4]:  # scaled by how often a token occurs in the whole batch
        return None
    return from_notation(f"{ids}z,{ids}->Vz", [v.shape for v in call.operands], [call.results[0].shape])


def nll_loss(call) -> Spec | None:
    """Sum of losses and sum of weights over rows; the mean is taken after both are whole."""
    reduction, weighted = call.instr.args[3], len(call.operands) == 3
    if reduction == 1 or len(call.operands[0].shape) != 2:
        return None
    result = "n" if reduction == 0 else ""
    words = [(result, "")[at] for at in range(2) if call.results_by_position[at]]
    return from_notation(f"nC,n{',C' if weighted else ''}->{','.join(words)}",
                         [v.shape for v in call.operands], [v.shape for v in call.results])  # fmt: skip


def nll_loss_backward(call) -> Spec | None:
    weighted = len(call.operands) == 5
    if len(call.operands[1].shape) != 2:
        return None
    grad = "n" if call.operands[0].shape else ""
    return from_notation(f"{grad},nC,n{',C' if weighted else ''},->nC",
                         [v.shape for v in call.operands], [call.results[0].shape])  # fmt: skip
