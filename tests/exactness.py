"""The sharded step against eager; also writes `docs/exactness.md` from the full matrix.

    python -m tests.exactness        # about ten minutes: every combination, then the table
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import model_values
from autosp_aot.export.canonical.canonical import canonical_program
from autosp_aot.export.joint import capture
from autosp_aot.export.subject import Subject
from autosp_aot.ir.program import Program
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.runtime.simulate import simulate
from examples import llama, plain
from tests.eager import difference, eager

HEADS = [(8, 8), (8, 2), (8, 1), (6, 6), (6, 2), (6, 1)]
RANKS = [1, 2, 3, 4, 6, 8]
LENGTHS, BATCHES = [64, 65], [1, 2]
LIMITS = {
    ("plain", "float64"): 1e-12, ("llama", "float64"): 1e-6, ("plain", "float32"): 1e-5, ("llama", "float32"): 1e-5,
}  # fmt: skip
WIDTH, VOCABULARY = 8, 64


@dataclass(frozen=True)
class Case:
    """One model and batch shape, to be compared at every number of ranks."""

    example: str
    dtype: str
    heads: int
    kv_heads: int
    length: int
    batch: int
    tied: bool

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.example == "plain":
            width = WIDTH * self.heads
            return plain.build_model(VOCABULARY, width, 1, self.heads, self.kv_heads, 128, self.tied, self.dtype)
        return llama.build_model(
            self.dtype, vocab_size=VOCABULARY, hidden_size=WIDTH * self.heads, intermediate_size=3 * WIDTH * self.heads,
            num_hidden_layers=1, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=WIDTH,
            tie_word_embeddings=self.tied,
        )  # fmt: skip

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Labels all there; masked for the first half of a row; masked for all of the first rank of two."""
        draw = torch.Generator().manual_seed(1)
        ids, labels = (torch.randint(VOCABULARY, (self.batch, self.length), generator=draw) for _ in range(2))
        for rows, end in ((0, 0), (1, self.length // 2), (self.batch, self.length // 2 + 2)):
            masked = labels.clone()
            masked[:rows, :end] = -100
            yield {"input_ids": ids, "labels": masked}


def captured(case: Case) -> tuple[nn.Module, Program, dict[str, Tensor]]:
    """The model, its whole step, and constants of the graph."""
    model = case.model()
    whole, constants = canonical_program(capture(Subject(model, next(case.batches()), "cpu")))
    return model, whole, constants


def errors(case: Case, ranks: list[int], recompute: str = "sac") -> Iterator[tuple[int, float]]:
    """(ranks, worst difference over ranks and masks) for each number of ranks."""
    model, whole, constants = captured(case)
    inputs = model_values(model) | dict(model.named_buffers()) | constants
    for count in ranks:
        compiled = compile_program(whole, {"input_ids": 1, "labels": 1}, BuildConfig(count, recompute=recompute))
        assert not compiled.fallbacks
        programs = [compiled.program.for_rank(rank) for rank in range(count)]
        worst = 0.0
        for batch in case.batches():
            reference = eager(model, batch)
            for result in simulate(programs, inputs | batch, torch.ones_like(reference[0])):
                gradients = {name.removeprefix("grad."): g for name, g in result.items() if name != "loss"}
                worst = max(worst, difference(reference, result["loss"], gradients))
        yield count, worst


def own_difference(case: Case) -> float:
    """How far eager is from itself when the rows of the batch are summed in another order."""
    model = case.model()
    return max(
        difference(eager(model, batch), *eager(model, {name: t.flip(0) for name, t in batch.items()}))
        for batch in case.batches()
    )


def matrix(example: str, dtype: str) -> Iterator[Case]:
    for (heads, kv), length, batch, tied in itertools.product(HEADS, LENGTHS, BATCHES, (False, True)):
        yield Case(example, dtype, heads, kv, length, batch, tied)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for (example, dtype), limit in LIMITS.items():
        found: dict[int, list[float]] = {count: [] for count in RANKS}
        own = []
        for case in matrix(example, dtype):
            print(case, file=sys.stderr)
            for count, error in errors(case, RANKS):
                found[count].append(error)
            if case.batch > 1:
                own.append(own_difference(case))
        worst = " | ".join(f"{max(found[count]):.0e}" for count in RANKS)
        rows.append(f"| {example} {dtype} | {worst} | {max(own):.0e} | {limit:.0e} |")
        assert max(max(values) for values in found.values()) <= limit, rows[-1]
        assert max(own) <= limit
    Path("docs/exactness.md").write_text(PAGE.format(rows="\n".join(rows), ranks=" | ".join(f"sp={n}" for n in RANKS)))


PAGE = """\
# Exactness

Generated by `python -m tests.exactness` (torch {torch}, CPU): both examples with (heads; key/value heads) in
(8; 8), (8; 2), (8; 1), (6; 6), (6; 2), (6; 1), S in 64, 65, B in 1, 2, embeddings tied and untied, labels whole, masked
for the first half of a row, and masked for all of the first rank of two. Every rank's loss and every gradient is compared
with eager: `|g - ref| / max(|ref|, 1e-4 r)`, r the root mean square of all gradient norms. The worst of all cases:

| | {{ranks}} | eager, batch rows permuted (noise floor) | limit |
|---|{dashes}---|---|
{{rows}}

llama in float64 casts to float32 inside (norms, rotary tables, logits), so its gradients differ by float32 roundings;
plain stays in its dtype throughout. With more ranks than heads, query rows are split as well.
""".format(torch=torch.__version__.partition("+")[0], dashes="---|" * len(RANKS))  # noqa: E501


if __name__ == "__main__":
    main()
