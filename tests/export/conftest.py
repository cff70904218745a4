from collections.abc import Callable

import pytest
import torch
from torch import nn

from autosp_aot.errors import BuildError
from autosp_aot.export.joint import Joint, capture
from autosp_aot.export.subject import Subject


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """2 rows of 4 tokens out of 8."""
    return {name: torch.arange(8).reshape(2, 4) for name in ("tokens", "labels")}


@pytest.fixture
def captured(batch) -> Callable[..., Joint]:
    """The joint graph of a module's step."""

    def run(model: nn.Module, target: str = "cpu") -> Joint:
        return capture(Subject(model, batch, target))

    return run


@pytest.fixture
def refusal(captured) -> Callable[..., str]:
    """The whole text of the BuildError that capturing a module ends in."""

    def run(model: nn.Module, target: str = "cpu") -> str:
        with pytest.raises(BuildError) as caught:
            captured(model, target)
        return str(caught.value)

    return run
