"""Build mistral, gemma3_text and llama on packed documents at 1,048,576 positions for 8 ranks, against the limits.

    python -m benchmarks.million [--seq 1048576] [--layers N]

Stock models of transformers, without weights, at the shapes of Mistral-7B, Gemma-3-4B and Llama-3.1-8B. Time counts
from the model to its artifact in memory. A value counts as large when it has more elements than one rank's widest
activation in an MLP, logits aside. Exit code 1 where a limit is passed.
"""

import argparse
import sys
import time
from math import prod

import torch
import transformers as hf

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.export.fake import weightless

RANKS, SECONDS = 8, 120
EIGHT = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=4096, intermediate_size=14336)
MODELS = {
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, EIGHT | dict(vocab_size=32000, sliding_window=4096), 32),
    "gemma3_text": (
        hf.Gemma3ForCausalLM, hf.Gemma3TextConfig,
        dict(num_attention_heads=8, num_key_value_heads=4, head_dim=256, hidden_size=2560, intermediate_size=10240,
             vocab_size=262144, sliding_window=1024), 34,
    ),
    "llama, packed": (hf.LlamaForCausalLM, hf.LlamaConfig, EIGHT | dict(vocab_size=128256), 32),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seq", type=int, default=2**20)
    parser.add_argument("--layers", type=int, help="instead of each model's own number")
    args = parser.parse_args()
    kept = [build(name, args.seq, args.layers or MODELS[name][3]) for name in MODELS]
    sys.exit(not all(kept))


def build(name: str, seq: int, layers: int) -> bool:
    """Build one model and print what it took; whether it keeps the limits."""
    model_class, config_class, options, _ = MODELS[name]
    config = config_class(**options, num_hidden_layers=layers, max_position_embeddings=seq, use_cache=False)
    began = time.perf_counter()
    with weightless():
        model = model_class._from_config(config, dtype=torch.bfloat16).train()
    inputs = ("input_ids", "labels", *(("position_ids",) if "packed" in name else ()))
    batch = {key: torch.zeros(1, seq, dtype=torch.int64) for key in inputs}
    artifact = compile_model(model, batch, dict.fromkeys(inputs, 1), BuildConfig(RANKS), "")
    seconds = time.perf_counter() - began
    program = artifact.program.for_rank(0)
    parameters = {entry.value.name for entry in program.inputs if entry.kind == "parameter"}
    parameters |= {label for section in program.sections for _, label in section.gives}
    widest = seq // RANKS * config.intermediate_size
    values = [v for v in program.values().values() if v.name not in parameters and config.vocab_size not in v.shape]
    largest = max(values, key=lambda value: prod(value.shape))
    fits = seconds < SECONDS and prod(largest.shape) <= widest
    print(f"{name:16} {layers} layers   {seconds:6.1f} s (limit {SECONDS})   largest value {list(largest.shape)}: "
          f"{prod(largest.shape) / widest:.2f} of the MLP's   {'' if fits else 'NOT KEPT'}".rstrip())  # fmt: skip
    return fits


if __name__ == "__main__":
    main()
