"""Forward takes the branches of eager: nothing that it asks says that it is being compiled, exported or traced."""

import os

import pytest
import torch
from torch._export.utils import _compiling_state_context
from torch.compiler import is_compiling
from torch.compiler import is_exporting as asked_before

from autosp_aot.export.flags import eager_flags
from tests.export.mend import H, Model, made, trains_as_eager

ASKED = {
    "is_compiling": lambda: torch.compiler.is_compiling(),
    "imported before": is_compiling,
    "is_exporting": asked_before,
    "torch._utils": lambda: torch._utils.is_compiling(),
    "dynamo": lambda: torch._dynamo.is_compiling(),
    "is_dynamo_compiling": lambda: torch.compiler.is_dynamo_compiling(),
    "fx": lambda: torch.fx._symbolic_trace.is_fx_tracing(),
    "is_tracing": lambda: torch.jit.is_tracing(),
    "is_scripting": lambda: torch.jit.is_scripting(),
}


class Branching(Model):
    def inner(self, x, labels):
        return x * (0.5 if any(asked() for asked in ASKED.values()) else 2.0)


class Solved(Model):
    def inner(self, x, labels):
        lower = torch.tril(self.linear.weight) + 2 * torch.eye(H)
        return torch.linalg.solve_triangular(lower, x.mT, upper=False).mT


@pytest.mark.parametrize("kind", [Branching, Solved])
def test_what_is_captured_is_what_eager_runs(kind):
    trains_as_eager(made(kind))


@pytest.mark.parametrize("name", ASKED)
def test_nothing_is_being_compiled(name):
    with eager_flags():
        assert not ASKED[name]()


def test_torch_itself_is_answered_as_before():
    users, torchs = {"is_compiling": is_compiling}, {"is_compiling": is_compiling}
    question = "answer = is_compiling()"
    with eager_flags(), _compiling_state_context():
        exec(compile(question, "model.py", "exec"), users)
        exec(compile(question, os.path.join(os.path.dirname(torch.__file__), "nn", "any.py"), "exec"), torchs)
    assert (users["answer"], torchs["answer"], is_compiling()) == (False, True, False)
