"""Learning rates are those of transformers' schedules."""

import pytest
import torch
from transformers import optimization

from autosp_aot.training.learning_rate import Schedule


def theirs(kind: str, steps: int, warmup: int, min_lr: float):
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    if kind == "constant":
        return optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    if kind == "cosine":
        return optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr=min_lr)
    return optimization.get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=min_lr, power=1.0)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 9])
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_every_step_s_learning_rate_is_theirs(kind, warmup, min_lr):
    schedule, reference = Schedule(0.5, kind, 10, warmup, min_lr), theirs(kind, 10, warmup, min_lr)
    for step in range(10):
        assert schedule.at(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        reference.optimizer.step()
        reference.step()
