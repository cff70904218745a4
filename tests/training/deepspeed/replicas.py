"""A tiny Llama, its micro-batches, a DeepSpeed config, and the same training without any of this: eager, unsharded.

AdamW's epsilon is above the rounding of a gradient: an element that is zero but for rounding has no direction. At 1e-8
one such element moves eager by 7e-6 when the rows of its batches change places, at 1e-6 all of it by 1e-7.
"""

import functools

import torch
from torch import Tensor

from examples import llama

STEPS, LR, DECAY, EPSILON = 20, 1e-3, 0.1, 1e-6
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def model(dtype: str = "float32") -> torch.nn.Module:
    torch.manual_seed(0)
    return llama.build_model(dtype, **SIZES)


def micro_batches(count: int) -> list[dict[str, Tensor]]:
    """Two rows of nine tokens each; a part of the first row has no labels, another in each batch."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        batch = {name: torch.randint(32, (2, 9), generator=rng) for name in ("input_ids", "labels")}
        batch["labels"][0, : number % 7] = -100
        found.append(batch)
    return found


def steps(count: int, items: bool = False) -> list[list[dict[str, Tensor]]]:
    """The `count` micro-batches of each step; with `items`, each has the number of labels that count in all of them."""
    batches = micro_batches(STEPS * count)
    found = [batches[first : first + count] for first in range(0, len(batches), count)]
    for step in found if items else ():
        number = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        for batch in step:
            batch["num_items_in_batch"] = number
    return found


def config(zero: int, accumulate: int, clip: float, bf16: bool = False, epsilon: float = EPSILON) -> dict:
    """What a DeepSpeed user of AutoSP has in ds.json."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "weight_decay": DECAY, "eps": epsilon, "torch_adam": True},
        },
        "compile": {"deepcompile": True, "passes": ["autosp"]},
    }


@functools.cache
def reference(accumulate: int, clip: float, dtype: str = "float32", items: bool = False) -> dict[str, Tensor]:
    """`losses` of all steps and the parameters at the end, of eager training with `accumulate` micro-batches a step.

    A step's loss is the mean of theirs; with `items` the sum of what is divided by the labels of all of them. Of
    bfloat16 parameters there are fp32 masters, which AdamW works on with gradients added up in fp32.
    """
    trained = model(dtype)
    masters = {name: p.detach().float().requires_grad_() for name, p in trained.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), LR, eps=EPSILON, weight_decay=DECAY)
    weight, losses = 1 if items else 1 / accumulate, []
    for step in steps(accumulate, items):
        found = []
        optimizer.zero_grad()
        for batch in step:
            trained.zero_grad()
            loss = trained(**batch).loss
            loss.backward()
            found.append(float(loss.detach()))
            for name, parameter in trained.named_parameters():
                part = parameter.grad.float() * weight
                masters[name].grad = part if masters[name].grad is None else masters[name].grad + part
        if clip:
            torch.nn.utils.clip_grad_norm_(masters.values(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter.copy_(masters[name])
        losses.append(sum(found) * weight)
    parameters = {name: p.detach() for name, p in trained.named_parameters()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **parameters}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The worst relative difference of a loss, or of a parameter by norm."""
    assert found.keys() == wanted.keys()
    far = {name: (found[name].double() - wanted[name].double()) for name in wanted}
    losses = (far.pop("losses").abs() / wanted["losses"].abs()).max()
    return max(float(losses), *(float(d.norm() / wanted[name].double().norm()) for name, d in far.items()))
