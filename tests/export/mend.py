"""A refusal and its way out: a model that is refused with a fix, and the same with that fix applied, which is built."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosp_aot.commands.build.builder import build
from autosp_aot.commands.check.oracle import Built, compare
from autosp_aot.errors import BuildError, Problem

V, H, S = 64, 16, 6
DIMS = {"tokens": 1, "labels": 1}


def batch(length: int) -> dict[str, Tensor]:
    """Two rows of tokens, and labels."""
    tokens = torch.arange(2 * length).view(2, length) % V
    return {"tokens": tokens, "labels": tokens.flip(1)}


BATCH = {
    **batch(S),
    "step": torch.tensor(3.0, dtype=torch.float64),
    "memory": torch.ones(2, 1, H, dtype=torch.float64),
}


class Model(nn.Module):
    """Each test has its own `inner` between the embedding and the head, and sets up what that needs."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, H))
        self.register_buffer("shift", torch.linspace(-1, 1, H))
        self.step = self.memory = None
        self.set_up()

    def set_up(self) -> None:
        pass

    def inner(self, x: Tensor, labels: Tensor) -> Tensor:
        return x

    def forward(self, tokens: Tensor, labels: Tensor, **more: Tensor) -> Tensor:
        x = self.inner(self.linear(self.embedding(tokens)), labels, **more)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Mend:
    """What is refused for `code` with the fix `fix`, and the same mended: what makes each, a class or a function.

    The line that is refused is marked `# here` in the source of `refused`; else it is `place`. Forward of what is
    mended also takes the inputs `more` of the batch.
    """

    code: str
    fix: str
    refused: Callable[[], nn.Module]
    mended: Callable[[], nn.Module]
    place: str = "build_model"
    more: tuple[str, ...] = ()
    target: str = "cpu"
    length: int = S

    def refusal(self, capfd: pytest.CaptureFixture) -> Problem:
        """The problem that the model is refused for; nothing is printed meanwhile."""
        model = made(self.refused)
        capfd.readouterr()
        with pytest.raises(BuildError) as caught:
            build(model, batch(self.length), 2, sequence_dims=DIMS, target=self.target)
        assert capfd.readouterr() == ("", "")
        return caught.value.problems[0]

    def holds(self, capfd: pytest.CaptureFixture) -> None:
        """The refusal is that, with that fix and line; and what is mended is built, and trains as eager does."""
        problem = self.refusal(capfd)
        found, wanted = (problem.code, problem.fix), (self.code, self.fix)
        assert found == wanted, f"{found} is not {wanted}"
        assert self.where() in problem.where, f"{problem.where} is not {self.where()}"
        trains_as_eager(made(self.mended), self.more, self.target)
        if self.length != S:
            build(made(self.mended), batch(self.length), 2, sequence_dims=DIMS, target=self.target, eager_check=False)

    def where(self) -> str:
        lines, first = inspect.getsourcelines(self.refused)
        marked = [first + at for at, line in enumerate(lines) if line.endswith("# here\n")]
        return f"{os.path.basename(inspect.getsourcefile(self.refused))}:{marked[0]}" if marked else self.place


def trains_as_eager(model: nn.Module, more: tuple[str, ...] = (), target: str = "cpu", steps: int = 2) -> None:
    """Steps of two ranks' programs are those of the model itself, which is trained by them."""
    given = {name: BATCH[name] for name in (*DIMS, *more)}
    artifact = build(model, given, 2, sequence_dims=DIMS, target=target, eager_check=False)
    programs = [artifact.program.for_rank(rank) for rank in range(2)]
    outcome = compare(model, given, Built(artifact.whole, programs, None, artifact.buffers), steps)
    assert outcome.steps == steps - 1 and not outcome.beyond


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The model, made in fp64 from a fixed seed: a cast would part what shares memory."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def line(function: Callable, offset: int = 0) -> str:
    """The line where a function begins, or one so many below."""
    return f"{os.path.basename(function.__code__.co_filename)}:{function.__code__.co_firstlineno + offset}"
