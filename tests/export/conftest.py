from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autosp_aot.errors import BuildError
from autosp_aot.export.fake import fake_copy
from autosp_aot.export.joint import Joint, capture


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """2 rows of 4 tokens out of 8."""
    return {name: torch.arange(8).reshape(2, 4) for name in ("tokens", "labels")}


@pytest.fixture
def captured(batch) -> Callable[..., Joint]:
    """The joint graph of a module's step."""

    def run(model: nn.Module, target: str = "cpu") -> Joint:
        mode = FakeTensorMode()
        return capture(fake_copy(model, mode), batch, mode, target)

    return run


@pytest.fixture
def refusal(captured) -> Callable[..., str]:
    """The whole text of the BuildError that capturing a module ends in."""

    def run(model: nn.Module, target: str = "cpu") -> str:
        with pytest.raises(BuildError) as caught:
            captured(model, target)
        return str(caught.value)

    return run
