"""A decoder in plain PyTorch: learned positions, grouped-query attention, LayerNorm, GELU, all in its own dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, hidden_size: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, hidden_size // heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, (heads + 2 * kv_heads) * self.width)
        self.out = nn.Linear(heads * self.width, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        heads = (self.heads, self.kv_heads, self.kv_heads)
        parts = self.qkv(self.norm_attention(x)).split([n * self.width for n in heads], dim=-1)
        q, k, v = (part.view(B, S, n, self.width).transpose(1, 2) for part, n in zip(parts, heads))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(B, S, -1))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    def __init__(self, vocab_size, hidden_size, layers, heads, kv_heads, max_length, tied):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, hidden_size), nn.Embedding(max_length, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, heads, kv_heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def build_model(vocab_size: int = 256, hidden_size: int = 128, layers: int = 2, heads: int = 8, kv_heads: int = 2,
                max_length: int = 4096, tied: bool = False, dtype: str = "float32") -> Decoder:  # fmt: skip
    model = Decoder(vocab_size, hidden_size, layers, heads, kv_heads, max_length, tied)
    return model.to(getattr(torch, dtype))


def example_batch(batch_size: int, seq_len: int) -> dict[str, Tensor]:
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}
