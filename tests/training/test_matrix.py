"""dp x sp ranks, ZeRO, accumulation and clipping: 20 steps are those of torch alone on one device.

AdamW turns rounding of small gradients into steps: at this rate eager with the rows of its batches swapped is 1.4e-6
from itself, at three times it 5e-6.
"""

from functools import cache
from itertools import product

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from autosp_aot.training.learning_rate import Schedule
from autosp_aot.training.loop import Training
from tests import training_runs as runs

STEPS, LR, DECAY = 20, 3e-3, 0.1
# Every two of zero, accumulate and clip meet at every dp and sp, and all three at every other.
CASES = [
    (dp, sp, zero, accumulate, clip)
    for at, (dp, sp) in enumerate([(1, 1), (1, 4), (2, 2), (4, 1)])
    for zero, (i, accumulate), (j, clip) in product((0, 1), enumerate((1, 3)), enumerate((None, 0.2)))
    if (at + zero + i + j) % 2 == 0
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {sp: runs.artifact(runs.model(), sp, folder / f"llama.sp{sp}") for sp in (1, 2, 4)}


@pytest.fixture(scope="module")
def eager(artifacts):
    @cache
    def run(count: int, clip: float | None, tied=False) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
        """Losses, parameters and gradient norms of `count` micro-batches a step."""
        model, feed, losses, norms = runs.model(tied), runs.random_tokens(artifacts[1]), [], []
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
        for step in range(STEPS):
            parts = [model(**feed.at(step * count + m)).loss for m in range(count)]
            loss = torch.stack(parts).mean()
            loss.backward()
            norms.append(clip_grad_norm_(model.parameters(), clip or float("inf")).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, {name: p.detach() for name, p in model.named_parameters()}, norms

    return run


@pytest.mark.parametrize("dp, sp, zero, accumulate, clip", CASES)
def test_twenty_steps_are_those_of_one_device(artifacts, eager, tmp_path, dp, sp, zero, accumulate, clip):
    training = Training(
        artifacts[sp], STEPS, dp, accumulate, Schedule(LR), zero, clip, DECAY, metrics=tmp_path / "m.jsonl"
    )
    expected = eager(dp * accumulate, clip)
    assert clip is None or min(expected[2]) > clip
    compare(training, sp, expected)


def test_a_tied_weight_is_stepped_once(eager, tmp_path):
    path = runs.artifact(runs.model(tied=True), 2, tmp_path / "tied.sp2")
    training = Training(path, STEPS, 2, 3, Schedule(LR), 1, 0.2, DECAY, metrics=tmp_path / "m.jsonl")
    compare(training, 2, eager(6, 0.2, tied=True))


def compare(training: Training, sp: int, reference) -> None:
    rows, states = runs.trained(training, sp, runs.random_tokens(training.artifact))
    expected, parameters, norms = reference
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    for name, parameter in parameters.items():
        assert (states[0][name] - parameter).norm() <= 1e-5 * parameter.norm(), name
        assert all(torch.equal(state[name], states[0][name]) for state in states)
