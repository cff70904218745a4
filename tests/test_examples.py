import pytest

from examples import causal_lm, llama

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 8, "num_attention_heads": 2}


@pytest.mark.parametrize("build_model", [llama.build_model, causal_lm.build_model])
def test_a_misspelled_option_is_refused(build_model):
    with pytest.raises(ValueError, match="has no field num_hiden_layers"):
        build_model(num_hiden_layers=1)


def test_any_causal_language_model_is_built_by_its_type():
    model = causal_lm.build_model("gemma2", attn_implementation="eager", num_key_value_heads=1, head_dim=8, **TINY)
    assert type(model).__name__ == "Gemma2ForCausalLM" and model.training
    assert model(**causal_lm.example_batch(1, 4)).loss.isfinite()
