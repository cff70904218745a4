"""The model of a Hugging Face folder, for `autosp-aot build`; its weights are read when training starts.

    autosp-aot build examples/deepspeed/model.py --sp 2 --batch 2 --seq 64 --set folder=tiny --no-weights -o tiny.sp2
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


def build_model(folder: str) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def example_batch(batch_size: int, seq_len: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}
