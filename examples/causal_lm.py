"""Any causal language model of transformers, by its type.

    autosp-aot build examples/causal_lm.py --sp 4 --seq 4096 --set model_type=mistral --set num_hidden_layers=2

Options are those of its config; `dtype` is one of them too.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


def build_model(model_type: str = "mistral", dtype: str = "float32", **options) -> nn.Module:
    """A model in training mode; what is not among the options is the config's default."""
    unknown = sorted(set(options) - {*AutoConfig.for_model(model_type).to_dict(), "attn_implementation"})
    if unknown:
        raise ValueError(f"the config of {model_type} has no field {', '.join(unknown)}")
    config = AutoConfig.for_model(model_type, use_cache=False, **options)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).train()


def example_batch(batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Token ids and labels, not shifted: the model does that."""
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}
