"""A source and a target of different lengths in one step: each is shared evenly."""

import pytest
import torch
import transformers as hf

from autosp_aot.passes.analysis.labels import Labels
from tests.steps import equal_to_eager, gathers

T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
          decoder_start_token_id=0, pad_token_id=0, use_cache=False)  # fmt: skip


@pytest.mark.parametrize("source, target, ranks", [(33, 20, 2), (33, 20, 3), (33, 20, 4), (20, 33, 3), (40, 3, 8)])
def test_t5_is_exact_and_nothing_it_computes_is_gathered(source, target, ranks):
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5)).double().train()
    batch = {"input_ids": torch.randint(3, 64, (2, source)), "labels": torch.randint(3, 64, (2, target))}
    batch["labels"][0, : target // 2] = -100
    compiled = equal_to_eager(model, batch, ranks, 1e-6)
    assert not compiled.fallbacks and not gathers(compiled.program, 2)


def test_each_length_has_even_shares_and_what_is_a_little_off_those_of_the_nearest():
    labels = Labels((33, 20), 2, {})
    assert labels.bounds(33) == ((0, 17), (17, 33)) and labels.bounds(20) == ((0, 10), (10, 20))
    assert labels.bounds(32) == ((0, 17), (17, 32)) and labels.bounds(21) == ((0, 10), (10, 21))
    assert labels.bounds(5) == ((0, 3), (3, 5))
