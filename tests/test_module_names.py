"""Modules may be called anything, and have several names: what is built is exact, and is written so that it is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosp_aot.commands.build.builder import build
from autosp_aot.commands.check.proof import check
from autosp_aot.commands.interchange.onnx_file import write_onnx
from autosp_aot.commands.interchange.output import export_rank
from autosp_aot.commands.interchange.pt2_file import write_pt2
from tests.steps import captured, equal_to_eager, half_labelled

V, H = 64, 16
# With marks of the text's own, in other alphabets, and called as values are that passes make.
NAMES = (
    "a b", "q(k, v)", "größe", "x:y", "%z", "a\\u0020b", "tab\t", "line\n", "recompute", "tile", "early", "grad",
    "loss", "free", "0",
)  # fmt: skip


class Named(nn.Module):
    """Layers of these names, at the top and inside; `seed` is a parameter, and dropout has a seed of its own."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.tokens, self.head, self.dropout = nn.Embedding(V, H), nn.Linear(H, V), dropout
        for name in NAMES:
            self.add_module(name, nn.Linear(H, H))
        self.inside = nn.ModuleDict({name: nn.Linear(H, H) for name in NAMES})
        self.inside["seed"] = nn.Linear(1, H)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for name in NAMES:
            x = x + F.gelu(self.inside[name](getattr(self, name)(x)))
        x = F.dropout(x + self.inside["seed"].bias, self.dropout)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Wrapped(nn.Module):
    """A slice of layers in a model, one of whose modules has two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, H)) for _ in range(3))
        self.tokens, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.embedding = self.tokens

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in (*self.layers[1:], self.layers[0][:2]):
            x = x + layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def model(kind: type[nn.Module], *args) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).double()


@pytest.mark.parametrize("kind", [Named, Wrapped])
def test_what_is_built_is_exact_at_any_number_of_ranks(kind):
    module = model(kind)
    step = captured(module, half_labelled(9))
    for ranks in (1, 2, 3):
        equal_to_eager(module, half_labelled(9), ranks, step=step)


@pytest.mark.parametrize("options", [
    {"recompute": "sac", "tile": 2}, {"recompute": "full", "tile": 2, "offload": "host"},
    {"recompute": "none", "offload": "host", "tile": "off"},
])  # fmt: skip
@pytest.mark.parametrize(("kind", "args"), [(Named, (0.1,)), (Wrapped, ())])
def test_what_is_written_is_read_and_proved(kind, args, options, tmp_path):
    path = build(model(kind, *args), half_labelled(9), 2, tmp_path / "a", target="cpu", **options)
    assert check(tmp_path / "a")
    named = {where.module for where in (instr.where for instr in path.program.instrs())}
    assert not any("slice" in name for name in named)


def test_so_it_is_for_other_tools(tmp_path):
    build(model(Named, 0.1), half_labelled(9), 2, tmp_path / "a", target="cpu", eager_check=False)
    for suffix, write in (("onnx", write_onnx), ("pt2", write_pt2)):
        assert export_rank(tmp_path / "a", 0, False, tmp_path / f"a.{suffix}", suffix, write).stat().st_size
