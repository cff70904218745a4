"""bf16 parameters with fp32 masters: as far from fp32 as eager bf16 with fp32 masters is, at most twice."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from autosp_aot.training.learning_rate import Schedule
from autosp_aot.training.loop import Training
from tests import training_runs as runs

STEPS, COUNT, LR, CLIP = 20, 6, 1e-2, 0.2


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {sp: runs.artifact(runs.model(dtype="bfloat16"), sp, folder / f"llama.sp{sp}") for sp in (1, 2, 4)}


@pytest.fixture(scope="module")
def exact_and_own(artifacts):
    """Eager's losses and parameters in fp32, and in bf16."""
    feed = runs.random_tokens(artifacts[1])
    return eager(feed, torch.float32), eager(feed, torch.bfloat16)


def eager(feed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses and parameters of 6 micro-batches a step, computed in `dtype` and stepped in fp32."""
    model = runs.model(dtype="bfloat16").to(dtype)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer, losses = torch.optim.AdamW(masters, LR), []
    for step in range(STEPS):
        losses.append(0.0)
        for number in range(COUNT):
            loss = model(**feed.at(step * COUNT + number)).loss
            loss.backward()
            losses[-1] += loss.item() / COUNT
            for master, parameter in zip(masters, model.parameters()):
                gradient = parameter.grad.float() / COUNT
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters()):
                parameter.copy_(master)
    return torch.tensor(losses), _end_to_end(model.parameters())


def _end_to_end(parameters) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in parameters])


@pytest.mark.parametrize("dp, sp, zero", [(1, 1, 0), (2, 2, 1), (1, 4, 0), (6, 1, 1)])
def test_twenty_steps_are_as_near_to_fp32_as_eager_s(artifacts, exact_and_own, tmp_path, dp, sp, zero):
    feed, (exact, own) = runs.random_tokens(artifacts[sp]), exact_and_own
    training = Training(
        artifacts[sp], STEPS, dp, COUNT // dp, Schedule(LR), zero, CLIP, metrics=tmp_path / "m.jsonl"
    )
    rows, states = runs.trained(training, sp, feed)
    losses = torch.tensor([row["loss"] for row in rows])
    found = losses, _end_to_end(states[0][name] for name, _ in runs.model().named_parameters())
    for ours, theirs, reference in zip(found, own, exact):
        assert (ours - reference).norm() <= 2 * (theirs - reference).norm()
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in state)
