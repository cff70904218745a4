"""One memory under two names: tied as eager ties it, or refused by name."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build_file
from autosp_aot.errors import BuildError
from tests.export.mend import BATCH, H, Mend, Model, S, made, trains_as_eager

AS_ONE = "make them one parameter, as in model.{} = model.{}"
COMPUTE = "keep one of them as a parameter, and compute what is to be the other from it in forward"
IN_FORWARD = "compute it from the parameter in forward"


class Plain(Model):
    def inner(self, x, labels):
        return x * self.gain


class TiedByData(Model):
    def set_up(self):
        self.head.weight.data = self.embedding.weight.data


class Tied(Model):
    def set_up(self):
        self.head.weight = self.embedding.weight


class TwoOfOne(Plain):
    def set_up(self):
        self.other = nn.Parameter(self.gain.data)

    def inner(self, x, labels):
        return x * self.gain + self.other


class OneTwice(Plain):
    def set_up(self):
        self.other = self.gain

    def inner(self, x, labels):
        return x * self.gain + self.other


class OneArray(Plain):
    """Two storages of one memory."""

    def set_up(self):
        array = np.linspace(0.5, 1.5, H)
        self.gain, self.other = (nn.Parameter(torch.from_numpy(array)) for _ in range(2))

    def inner(self, x, labels):
        return x * self.gain + self.other


class PartOfAnother(Plain):
    def set_up(self):
        self.scale = nn.Parameter(self.gain.data[:1])

    def inner(self, x, labels):
        return x * self.gain * self.scale


class PartInForward(Plain):
    def inner(self, x, labels):
        return x * self.gain * self.gain[:1]


class View(Plain):
    def set_up(self):
        self.transposed = self.linear.weight.data.t()

    def inner(self, x, labels):
        return x @ self.transposed


class ViewInAList(View):
    def set_up(self):
        self.kept = [self.linear.weight.data.t()]

    def inner(self, x, labels):
        return x @ self.kept[0]


class ViewAsBuffer(View):
    def set_up(self):
        self.register_buffer("transposed", self.linear.weight.data.t())


class ViewInForward(View):
    def set_up(self):
        pass

    def inner(self, x, labels):
        return x @ self.linear.weight.detach().t()


class NoParameter(Plain):
    def set_up(self):
        self.scale = torch.ones(H, requires_grad=True)

    def inner(self, x, labels):
        return x * self.scale


class Registered(NoParameter):
    def set_up(self):
        self.scale = nn.Parameter(torch.ones(H))


OUTSIDE, LAYER = nn.Parameter(torch.ones(H, dtype=torch.float64)), nn.Linear(H, H).double()


class Outside(Plain):
    def inner(self, x, labels):
        return x * OUTSIDE  # here


class LayerOutside(Plain):
    def inner(self, x, labels):
        return LAYER(x)  # here


class LayerInside(Plain):
    def set_up(self):
        self.layer = LAYER

    def inner(self, x, labels):
        return self.layer(x)


class HasRun(Model):
    """Keeps a tensor of the step that has run."""

    def inner(self, x, labels):
        self.last = x * self.gain
        return self.last


def has_run():
    model = HasRun()
    model(BATCH["tokens"], BATCH["labels"])
    return model


THROUGH_SELF = "make it a parameter or a submodule of the model, and reach it through self"
NOT_RUN = (
    "give a model that has not run, and keeps nothing; for torch.nn.utils.weight_norm take "
    "torch.nn.utils.parametrizations.weight_norm"
)
class Frozen(Plain):
    """A name of a trained parameter, under which it is not trained."""

    def set_up(self):
        self.fixed = nn.Parameter(self.linear.weight.data, requires_grad=False)

    def inner(self, x, labels):
        return x @ self.fixed


class Detached(Plain):
    def inner(self, x, labels):
        return x @ self.linear.weight.detach()


class Expanded(Plain):
    def set_up(self):
        self.rows = nn.Parameter(torch.ones(1, 1, dtype=torch.float64).expand(1, H))

    def inner(self, x, labels):
        return x * self.rows


class ExpandedInForward(Plain):
    def set_up(self):
        self.rows = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def inner(self, x, labels):
        return x * self.rows.expand(1, H)


class ArrayOfOne(Plain):
    """An array of numpy's that a weight lies in."""

    def set_up(self):
        self.array = self.linear.weight.detach().numpy()

    def inner(self, x, labels):
        return x @ torch.from_numpy(self.array).t()


class ViewInANamespace(Plain):
    def set_up(self):
        self.held = argparse.Namespace(weight=self.linear.weight.detach())

    def inner(self, x, labels):
        return x @ self.held.weight.t()


MENDS = [
    Mend("parameters-overlap", "compute with linear.weight.detach() in forward, in place of fixed", Frozen, Detached),
    Mend("parameters-overlap", "make a parameter of the part that repeats, and expand it in forward", Expanded,
         ExpandedInForward),
    *(Mend("parameter-viewed", IN_FORWARD, kind, ViewInForward) for kind in (ArrayOfOne, ViewInANamespace)),
    Mend("parameters-overlap", AS_ONE.format("head.weight", "embedding.weight"), TiedByData, Tied),
    Mend("parameters-overlap", AS_ONE.format("other", "gain"), TwoOfOne, OneTwice),
    Mend("parameters-overlap", AS_ONE.format("other", "gain"), OneArray, OneTwice),
    Mend("parameters-overlap", COMPUTE, PartOfAnother, PartInForward),
    *(Mend("parameter-viewed", IN_FORWARD, kind, ViewInForward) for kind in (View, ViewInAList, ViewAsBuffer)),
    Mend("parameter-unregistered", "make it an nn.Parameter, or call requires_grad_(False)", NoParameter, Registered),
    Mend("parameter-outside", THROUGH_SELF, Outside, Registered),
    Mend("parameter-outside", THROUGH_SELF, LayerOutside, LayerInside),
    Mend("state-mutated", NOT_RUN, has_run, HasRun),
]


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.refused.__name__)
def test_memory_of_two_names_is_refused_with_a_fix_that_builds(mend, capfd):
    mend.holds(capfd)


class SlicesOfOne(Plain):
    """Parameters beside each other in one memory, as FlatParameter has them."""

    def set_up(self):
        flat = torch.linspace(-1, 1, 2 * H, dtype=torch.float64)
        self.one, self.two = nn.Parameter(flat[:H]), nn.Parameter(flat[H:])

    def inner(self, x, labels):
        return x * self.one + self.two


class Interleaved(SlicesOfOne):
    """Of one memory, in turns."""

    def set_up(self):
        flat = torch.linspace(-1, 1, 2 * H, dtype=torch.float64)
        self.one, self.two = nn.Parameter(flat[::2]), nn.Parameter(flat[1::2])


class Frozen(Plain):
    """What nothing trains may lie in one memory."""

    def set_up(self):
        weight = torch.eye(H, dtype=torch.float64)
        self.one, self.two = (nn.Parameter(weight, requires_grad=False) for _ in range(2))

    def inner(self, x, labels):
        return x @ self.one + x @ self.two


class InAList(Plain):
    """A parameter is reached through a list as well."""

    def set_up(self):
        self.kept = [self.gain]

    def inner(self, x, labels):
        return x * self.kept[0]


@pytest.mark.parametrize("kind", [Tied, OneTwice, SlicesOfOne, Interleaved, Frozen, InAList])
def test_what_an_optimizer_steps_once_is_captured(kind):
    trains_as_eager(made(kind), steps=3)


def test_ties_by_data_are_refused_on_the_command_line_as_in_python(tmp_path):
    (tmp_path / "tied.py").write_text(
        "import torch\nfrom tests.export.test_sharing import TiedByData\n"
        "def build_model():\n    return TiedByData()\n"
        "def example_batch(batch_size, seq_len):\n"
        "    ids = torch.arange(batch_size * seq_len).view(batch_size, seq_len)\n"
        "    return {'tokens': ids, 'labels': ids}\n"
    )
    with pytest.raises(BuildError, match="error.parameters-overlap.: parameters 'embedding.weight' and 'head.weight'"):
        build_file(tmp_path / "tied.py", BuildConfig(2), S, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
