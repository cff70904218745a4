"""How many ids an integer input may hold, by the embeddings that look it up."""

from autosp_aot.ir.program import Program


def vocabularies(whole: Program) -> dict[str, int]:
    """How many ids a value may hold: the rows of the smallest embedding that looks it up."""
    values = whole.values()
    found: dict[str, int] = {}
    for instr in whole.instrs():
        if instr.op == "aten.embedding.default":
            table, ids = instr.refs()
            found[ids] = min(found.get(ids, values[table].sizes[0]), values[table].sizes[0])
    return found
