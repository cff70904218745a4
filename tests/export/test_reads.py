"""Reading a value of the batch is refused by what it is read for, and the fix of its kind is one that works."""

import math
import warnings

import numpy as np
import pytest
import torch

from autosp_aot.export.reads import PURPOSES
from tests.export.mend import Mend, Model, V


class Asserted(Model):
    def inner(self, x, labels):
        assert (labels < V).all(), "too large"  # here
        return x


class Raised(Model):
    def inner(self, x, labels):
        if (labels >= V).any():  # here
            raise ValueError("too large")
        return x


class Warned(Model):
    def inner(self, x, labels):
        if x.isnan().any():  # here
            print("not a number")
        return x


class AssertedByTorch(Model):
    def inner(self, x, labels):
        torch._assert_async((labels < V).all())
        torch._check((labels < V).all().item())
        torch._assert(x.isfinite().all(), "not finite")
        return x


class Logged(Model):
    def inner(self, x, labels):
        self.logged = x.norm().item()  # here
        return x


class LoggedLater(Model):
    def inner(self, x, labels):
        self.logged = x.norm().detach()
        return x


class Printed(Model):
    def inner(self, x, labels):
        norm = x.norm()
        print(f"norm {float(norm):.3f}")  # here
        return x


class Boolean(Model):
    def inner(self, x, labels):
        return x + x[labels > 3].mean()  # here


class Masked(Model):
    def inner(self, x, labels):
        mask = (labels > 3)[..., None]
        return x + (x * mask).sum() / mask.expand_as(x).sum()


class Found(Model):
    def inner(self, x, labels):
        rows, columns = torch.where(labels > 3)  # here
        return x + x[rows, columns].mean()


class Cut(Model):
    def inner(self, x, labels):
        length = int(labels.clamp(max=4).max())  # here
        return torch.cat([x[:, :length], 0 * x[:, length:]], 1)


class CutByMask(Model):
    def inner(self, x, labels):
        return x * (torch.arange(x.shape[1]) < labels.clamp(max=4).max())[:, None]


class Looped(Model):
    def inner(self, x, labels):
        for _ in range(labels[0, 0]):  # here
            x = x * 1.5
        return x


class LoopedByMask(Model):
    def inner(self, x, labels):
        for at in range(V):
            x = torch.where(at < labels[0, 0], x * 1.5, x)
        return x


class Branch(Model):
    def inner(self, x, labels):
        if x.norm() > 1:  # here
            x = x / 2
        return x


class BranchOfAName(Model):
    def inner(self, x, labels):
        large = x.norm().item()  # here
        return x / 2 if large > 1 else x


class Chosen(Model):
    def inner(self, x, labels):
        return torch.where(x.norm() > 1, x / 2, x)


class Element(Model):
    def inner(self, x, labels):
        at = labels[0].argmin()
        return x + x[:, at].unsqueeze(1)  # here


class Selected(Model):
    def inner(self, x, labels):
        at = labels[0].argmin()
        return x + x.index_select(1, at.view(1))


class Warning(Model):
    def inner(self, x, labels):
        if x.isnan().any():  # here
            warnings.warn("not a number")
        return x


class Stopped(Model):
    def inner(self, x, labels):
        if x.isnan().any():  # here
            print("not a number")
            raise ValueError("not a number")
        return x


class Formatted(Model):
    def inner(self, x, labels):
        self.text = f"{x.norm():.3f}"  # here
        return x


class Added(Model):
    def set_up(self):
        self.total = 0.0

    def inner(self, x, labels):
        self.total += x.norm().item()  # here
        return x


class Returned(Model):
    def forward(self, tokens, labels):
        loss = super().forward(tokens, labels)
        return loss, {"logged": loss.item()}  # here


class ReturnedLater(Model):
    def forward(self, tokens, labels):
        loss = super().forward(tokens, labels)
        return loss, {"logged": loss.detach()}


class Matched(Model):
    def inner(self, x, labels):
        match int(labels[0, 0]):  # here
            case 0:
                return x * 2
        return x


class MatchedByMask(Model):
    def inner(self, x, labels):
        return torch.where(labels[0, 0] == 0, x * 2, x)


class Bounded(Model):
    def inner(self, x, labels):
        at = labels.clamp(max=4).max()
        return torch.cat([x[:, :at], 0 * x[:, at:]], 1)  # here


class AtLeastOne(Model):
    def inner(self, x, labels):
        return x / max((labels > 3).sum(), 1)  # here


class Clamped(Model):
    def inner(self, x, labels):
        return x / (labels > 3).sum().clamp(min=1)


class Counted(Model):
    def inner(self, x, labels):
        return x * torch.bincount(labels.flatten(), minlength=V)[labels][..., None]  # here


class CountedOneHot(Model):
    def inner(self, x, labels):
        return x * torch.nn.functional.one_hot(labels, V).flatten(0, -2).sum(0)[labels][..., None]


class Repeated(Model):
    def inner(self, x, labels):
        times = (labels[0] >= 0).long()
        return x.repeat_interleave(times, 1)  # here


class RepeatedInAll(Model):
    def inner(self, x, labels):
        times = (labels[0] >= 0).long()
        return x.repeat_interleave(times, 1, output_size=labels.shape[1])


class OfTensors(Model):
    def inner(self, x, labels):
        return x * torch.tensor([labels[0, 0], labels[0, 1]]).sum()  # here


class Stacked(Model):
    def inner(self, x, labels):
        return x * torch.stack([labels[0, 0], labels[0, 1]]).sum()


class OfItself(Model):
    """A name that is assigned of itself."""

    def inner(self, x, labels):
        x = x * 2
        x = x * x.norm().item()  # here
        return x


class ScaledItself(Model):
    def inner(self, x, labels):
        x = x * 2
        return x * x.norm().detach()


class Logarithm(Model):
    def inner(self, x, labels):
        return x * math.log(x.norm().item())  # here


class OfTensorsLogarithm(Model):
    def inner(self, x, labels):
        return x * x.norm().detach().log()


class Caught(Model):
    """Goes on without the value, as models do that guard a log: what capture raises must not be lost in there."""

    def inner(self, x, labels):
        try:
            return x * x.norm().item()  # here
        except Exception:
            return x


class Array(Model):
    def inner(self, x, labels):
        return x * float(np.asarray(x.detach()).mean())  # here


class OfTheTensor(Model):
    def inner(self, x, labels):
        return x * x.detach().mean()


class AssertedByUser(Model):
    def inner(self, x, labels):
        return x * _assert_small(x.norm().item())  # here


class AssertedAsync(Model):
    def inner(self, x, labels):
        norm = x.norm().detach()
        torch._assert_async(norm < 1e9)
        return x * norm


def _assert_small(norm: float) -> float:
    return norm


class Number(Model):
    def inner(self, x, labels):
        return x * x.norm().item()  # here


class Scaled(Model):
    def inner(self, x, labels):
        return x * x.norm().detach()


class List(Model):
    def inner(self, x, labels):
        return x * torch.tensor(labels[0].tolist())[:, None]  # here


class Stayed(Model):
    def inner(self, x, labels):
        return x * labels[0, :, None]


MENDS = [
    Mend("data-dependent", PURPOSES[kind][1], refused, mended)
    for kind, refused, mended in (
        ("assertion", Asserted, AssertedByTorch), ("assertion", Raised, AssertedByTorch),
        ("log", Warned, LoggedLater), ("log", Logged, LoggedLater), ("log", Printed, LoggedLater),
        ("boolean index", Boolean, Masked), ("boolean index", Found, Masked), ("length", Cut, CutByMask),
        ("length", Looped, LoopedByMask), ("branch", Branch, Chosen), ("branch", BranchOfAName, Chosen),
        ("element", Element, Selected), ("number", Number, Scaled), ("number", List, Stayed),
        ("log", Warning, LoggedLater), ("assertion", Stopped, AssertedByTorch), ("log", Formatted, LoggedLater),
        ("log", Added, LoggedLater), ("log", Returned, ReturnedLater), ("branch", Matched, MatchedByMask),
        ("length", Bounded, CutByMask), ("comparison", AtLeastOne, Clamped), ("count", Counted, CountedOneHot),
        ("repeats", Repeated, RepeatedInAll), ("tensor of tensors", OfTensors, Stacked),
        ("number", OfItself, ScaledItself), ("number", Logarithm, OfTensorsLogarithm), ("number", Caught, Scaled),
        ("number", Array, OfTheTensor), ("assertion", AssertedByUser, AssertedAsync),
    )
]  # fmt: skip


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.refused.__name__)
def test_a_read_is_refused_with_a_fix_that_builds(mend, capfd):
    mend.holds(capfd)
