"""Stock architectures in every way they are trained: a table, batches, and `docs/models.md`.

    python -m tests.architectures        # the cases of the suite, in which every two values meet; then the table
    python -m tests.architectures all    # every architecture x mask x loss x length x ranks: hours
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn

from autosp_aot.commands.build.builder import capture_model
from autosp_aot.export.subject import Subject
from autosp_aot.runtime.simulate import simulate
from tests.eager import eager
from tests.steps import built, eager_loss, evaluation, losses, worst

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, use_cache=False, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    use_cache=False, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
)  # fmt: skip
DRY = dict(resid_pdrop=0.0, embd_pdrop=0.0)
TWO = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=5)
GEMMA = dict(query_pre_attn_scalar=8)
BERT = dict(SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
          decoder_start_token_id=0, pad_token_id=0, use_cache=False)  # fmt: skip
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
ROUTED = dict(num_local_experts=6, num_experts_per_tok=2)

MASKS = ("none", "ones", "right", "left", "packed")
LOSSES = ("all", "half", "first rank", "items")
LENGTHS, RANKS = (33, 64), (2, 3, 4, 8)
RECOMPUTE, TILES, OFFLOAD = ("none", "sac", "full"), ("off", 3), ("off", "host")


@dataclass(frozen=True)
class Architecture:
    """How to make a model, the masks and losses it takes, and its dtype.

    It is fp32 where the lowest fp64 number, with which the model hides keys, would become -inf in an fp32 softmax: rows
    of padding then are NaN in eager.
    """

    model: type
    config: type
    options: dict
    masks: tuple[str, ...] = MASKS
    losses: tuple[str, ...] = LOSSES
    dtype: torch.dtype = torch.float64

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model(self.config(**self.options)).to(self.dtype).train()

    @property
    def limit(self) -> float:
        return 1e-6 if self.dtype is torch.float64 else 1e-5


UNPACKED = MASKS[:4]
PLAIN = ("all", "half", "first rank")
ARCHITECTURES = {
    "bart": Architecture(
        hf.BartForConditionalGeneration, hf.BartConfig,
        dict(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
             dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, use_cache=False),
        UNPACKED, PLAIN,
    ),
    "bert": Architecture(hf.BertForMaskedLM, hf.BertConfig, BERT, UNPACKED, PLAIN),
    "bloom": Architecture(
        hf.BloomForCausalLM, hf.BloomConfig, dict(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, use_cache=False),
        UNPACKED, dtype=torch.float32,
    ),
    "convbert": Architecture(hf.ConvBertForMaskedLM, hf.ConvBertConfig, BERT | {"embedding_size": 32}, UNPACKED, PLAIN),
    "deberta_v2": Architecture(
        hf.DebertaV2ForMaskedLM, hf.DebertaV2Config,
        BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2}, UNPACKED, PLAIN,
    ),
    "gemma": Architecture(hf.GemmaForCausalLM, hf.GemmaConfig, SMALL),
    "gemma2": Architecture(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, SMALL | TWO | GEMMA | {"attn_implementation": "eager"},
        dtype=torch.float32,
    ),
    "gemma3_text": Architecture(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, SMALL | TWO | GEMMA),
    "gpt2": Architecture(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "gpt_bigcode": Architecture(hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig, GPT2, UNPACKED),
    "gpt_neox": Architecture(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SMALL),
    "gpt_oss": Architecture(hf.GptOssForCausalLM, hf.GptOssConfig, SMALL | TWO | ROUTED),
    "gptj": Architecture(hf.GPTJForCausalLM, hf.GPTJConfig, GPT2 | {"rotary_dim": 4}),
    "llama": Architecture(hf.LlamaForCausalLM, hf.LlamaConfig, SMALL),
    "mamba2": Architecture(
        hf.Mamba2ForCausalLM, hf.Mamba2Config,
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8, n_groups=2,
             chunk_size=8, use_cache=False), ("none", "ones"), PLAIN,
    ),
    "mistral": Architecture(hf.MistralForCausalLM, hf.MistralConfig, SMALL | {"sliding_window": 5}),
    "mixtral": Architecture(hf.MixtralForCausalLM, hf.MixtralConfig, SMALL | ROUTED),
    "mixtral, auxiliary loss": Architecture(
        hf.MixtralForCausalLM, hf.MixtralConfig, SMALL | ROUTED | {"output_router_logits": True}
    ),
    "mpt": Architecture(
        hf.MptForCausalLM, hf.MptConfig,
        dict(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_seq_len=128, use_cache=False), UNPACKED,
        dtype=torch.float32,
    ),
    "olmo2": Architecture(hf.Olmo2ForCausalLM, hf.Olmo2Config, SMALL),
    "opt": Architecture(
        hf.OPTForCausalLM, hf.OPTConfig,
        SMALL | {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}, UNPACKED,
    ),
    "phi": Architecture(hf.PhiForCausalLM, hf.PhiConfig, SMALL | DRY),
    "phi3": Architecture(hf.Phi3ForCausalLM, hf.Phi3Config, SMALL),
    "qwen2": Architecture(hf.Qwen2ForCausalLM, hf.Qwen2Config, SMALL),
    "qwen3": Architecture(hf.Qwen3ForCausalLM, hf.Qwen3Config, SMALL),
    "qwen3_moe": Architecture(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, SMALL | EXPERTS),
    "qwen3_moe, auxiliary loss": Architecture(
        hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, SMALL | EXPERTS | {"output_router_logits": True}
    ),
    "t5": Architecture(hf.T5ForConditionalGeneration, hf.T5Config, T5, UNPACKED, PLAIN),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One step of one architecture at one number of ranks."""

    name: str
    mask: str
    loss: str
    length: int
    ranks: int
    recompute: str = "sac"
    tile: str | int = "off"
    offload: str = "off"

    def batch(self) -> dict[str, Tensor]:
        """Two rows; what padding hides has no label."""
        draw, length = torch.Generator().manual_seed(1), self.length
        ids, labels = (torch.randint(3, 64, (2, length), generator=draw) for _ in range(2))
        batch = {"input_ids": ids, "labels": labels}
        if self.loss == "half":
            labels[0, : length // 2] = -100
        if self.loss == "first rank":
            labels[:, : length // self.ranks + 2] = -100
        if self.mask in ("ones", "right", "left"):
            batch["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
            hidden = {"ones": slice(0), "right": slice(length - 7, None), "left": slice(7)}[self.mask]
            batch["attention_mask"][1, hidden], labels[1, hidden] = 0, -100
        if self.mask == "packed":
            parts = [(end, length - end) for end in (length // 3, length - length // 3)]
            batch["position_ids"] = torch.stack([torch.cat(list(map(torch.arange, part))) for part in parts])
        if self.loss == "items":
            batch["num_items_in_batch"] = torch.tensor(2.5 * length)
        return batch

    @property
    def step(self) -> tuple:
        """What its capture depends on: which inputs there are and their shapes, not the numbers in them."""
        given = self.mask if self.mask in ("none", "packed") else "given"
        return self.name, given, self.loss == "items", self.length

    @property
    def program(self) -> tuple:
        """What its programs depend on."""
        return *self.step, self.ranks


def outcomes(tried: list[Case]) -> Iterator[tuple[Case, float, tuple]]:
    """The worst difference of any rank from eager and what falls back, of cases of one step, which is captured once.

    A third of the programs evaluate as well.
    """
    architecture = ARCHITECTURES[tried[0].name]
    model, reference = architecture.build(), architecture.build()
    reference.config._experts_implementation = "eager"
    step = capture_model(Subject(model, tried[0].batch(), "cpu"))
    for _, alike in itertools.groupby(tried, lambda case: case.program):
        first, *others = alike
        options = {"recompute": first.recompute, "tile": first.tile, "offload": first.offload}
        compiled, inputs = built(model, first.batch(), first.ranks, step=step, **options)
        programs = [compiled.program.for_rank(rank) for rank in range(first.ranks)]
        evaluates = first.recompute == "sac"
        evaluated, known = evaluation(model, first.batch(), first.ranks, step, **options) if evaluates else (None, {})
        for case in (first, *others):
            batch = case.batch()
            error = worst(eager(reference, batch), simulate(programs, inputs | batch, inputs["grad_loss"]))
            if evaluated:
                wanted = eager_loss(reference, batch)
                found = losses(evaluated, known | batch)
                error = max(error, *(float((loss - wanted).abs() / wanted.abs()) for loss in found))
            yield case, error, compiled.fallbacks


def cases() -> Iterator[Case]:
    """All of them."""
    for name, known in ARCHITECTURES.items():
        for values in itertools.product(known.masks, known.losses, LENGTHS, RANKS):
            yield Case(name, *values)


def pairwise() -> list[Case]:
    """Cases in which every two values that go together meet, chosen greedily in order.

    A case costs more where it is the first of its step, or of its programs.
    """
    left = {case: pairs(case) for case in cases()}
    missing = {pair for case in left for pair in left[case]}
    known: set[tuple] = set()
    chosen = []
    while missing:
        cost = lambda case: 1 + (case.step not in known) + (case.program not in known)  # noqa: E731
        best = max(left, key=lambda case: len(missing & left[case]) / cost(case))
        chosen.append(best)
        missing -= left[best]
        known |= {best.step, best.program}
    return chosen


def steps(chosen: list[Case]) -> list[list[Case]]:
    """The cases of each step, those of the same programs together.

    What is recomputed, tiled and offloaded takes turns from programs to programs: all twelve ways in twelve of them, so
    every architecture is trained with each value.
    """
    first = list(ARCHITECTURES).index
    ordered = sorted(chosen, key=lambda case: (first(case.name), *case.program[1:]))
    taken = []
    for turn, (_, alike) in enumerate(itertools.groupby(ordered, lambda case: case.program)):
        memory = {"recompute": RECOMPUTE[turn % 3], "tile": TILES[turn % 2], "offload": OFFLOAD[turn // 2 % 2]}
        taken += [replace(case, **memory) for case in alike]
    return [list(alike) for _, alike in itertools.groupby(taken, lambda case: case.step)]


def pairs(case: Case) -> set[tuple]:
    values = list(enumerate((case.name, case.mask, case.loss, case.length, case.ranks)))
    return set(itertools.combinations(values, 2))


def main() -> None:
    torch.set_num_threads(1)
    tried, rows = steps(list(cases()) if sys.argv[1:] == ["all"] else pairwise()), []
    for name, known in ARCHITECTURES.items():
        found, fell = [], {}
        for alike in tried:
            for case, error, fallbacks in outcomes(alike) if alike[0].name == name else ():
                print(case, f"{error:.0e}", file=sys.stderr)
                assert error <= known.limit, case
                found.append(error)
                fell |= {fallback.op: fallback.gathered_bytes for fallback in fallbacks}
        replicated = ", ".join(f"`{op}` ({count} bytes gathered)" for op, count in sorted(fell.items())) or "nothing"
        columns = name, ", ".join(known.masks), ", ".join(known.losses), len(found), f"{max(found):.0e}", replicated
        rows.append(f"| {' | '.join(map(str, columns))} |")
    Path("docs/models.md").write_text(PAGE.format(rows="\n".join(rows)))


PAGE = f"""\
# Models

Generated by `python -m tests.architectures` (torch {torch.__version__.partition("+")[0]}, transformers
{hf.__version__}, CPU): stock architectures, nothing patched, with S in {LENGTHS} over {RANKS} ranks, two rows, in fp64
(most cast to fp32 inside; bloom, gemma2 and mpt in fp32). Each is one or two layers small; nothing in the compiler
knows their names.

Masks: none; `attention_mask` of ones; padding on the right and on the left of a row; two documents a row packed through
`position_ids`. Losses: all labels; half a row without; none on the first rank; `num_items_in_batch` given. Every two of
architecture, mask, loss, length and number of ranks meet in some case; recompute (none, sac, full), tiles (none, 3) and
offload (off, host) take turns. "Worst" is the worst difference of any rank's loss or gradients from eager, as
[exactness.md](exactness.md) measures it.

| architecture | masks | losses | cases | worst | computed on every rank |
|---|---|---|---|---|---|
{{rows}}
"""


if __name__ == "__main__":
    main()
