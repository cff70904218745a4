"""What a step changes beyond its end, and what capture would drop: refused with a fix that builds."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autosp_aot.export import diagnose
from tests.export.mend import H, Mend, Model, line, made


class Plain(Model):
    def inner(self, x, labels):
        return x * self.gain


# --- what changes beyond a step ---


class ParameterClamped(Model):
    def inner(self, x, labels):
        self.gain.data.clamp_(-1, 1)  # here
        return x * self.gain


class ParameterMoved(Model):
    def inner(self, x, labels):
        self.gain.data = 0.9 * self.gain.data  # here
        return x * self.gain


class ParameterCopied(Model):
    def inner(self, x, labels):
        with torch.no_grad():
            self.gain.copy_(0.9 * self.gain)  # here
        return x * self.gain


class ClampedCopy(Model):
    def inner(self, x, labels):
        return x * self.gain.clamp(-1, 1)


class Averaged(Model):
    def set_up(self):
        self.norm = nn.BatchNorm1d(H)

    def inner(self, x, labels):
        return self.norm(x.mT).mT


class OfTheBatchAlone(Averaged):
    def set_up(self):
        self.norm = nn.BatchNorm1d(H, track_running_stats=False)


class BufferShifted(Model):
    def inner(self, x, labels):
        self.shift.mul_(0.9)  # here
        return x + self.shift


class BufferReplaced(Model):
    def inner(self, x, labels):
        self.shift = 0.9 * self.shift  # here
        return x + self.shift


class ShiftedAnew(Model):
    def inner(self, x, labels):
        shift = 0.9 * self.shift
        return x + shift


class LabelsMasked(Model):
    def inner(self, x, labels):
        labels[labels == 3] = -100  # here
        return x


class LabelsCopied(Model):
    def inner(self, x, labels):
        labels = labels.clone()
        labels[labels == 3] = -100
        return x * (labels != -100)[..., None]


# --- what capture would drop ---


class AutocastToCuda(Model):
    def inner(self, x, labels):
        with torch.autocast("cuda", torch.bfloat16):  # here
            return self.linear(x)


def half():
    return made(Plain).to(torch.bfloat16)


class Reentrant(Model):
    def inner(self, x, labels):
        return checkpoint(torch.sin, x, use_reentrant=True)  # here


class NotReentrant(Model):
    def inner(self, x, labels):
        return checkpoint(torch.sin, x, use_reentrant=False)


class HookInForward(Model):
    def inner(self, x, labels):
        x.register_hook(lambda grad: 2 * grad)  # here
        return x


class HookOfAModuleInForward(Model):
    def inner(self, x, labels):
        self.linear.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))  # here
        return x


class HookOnAWeightInForward(Model):
    def inner(self, x, labels):
        self.gain.register_post_accumulate_grad_hook(lambda gain: gain.grad.mul_(2))  # here
        return x * self.gain


class SavedInHalf(Model):
    def inner(self, x, labels):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.double()):  # here
            return x.sin()


def hook_on_a_module():
    model = made(Plain)
    model.head.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    return model


class GradientDoubled(Model):
    """What the hook does, in forward."""

    def inner(self, x, labels):
        return 2 * x - x.detach()


class GradientInside(Model):
    def inner(self, x, labels):
        (slope,) = torch.autograd.grad((x * x).sum(), x, create_graph=True)  # here
        return x + slope


class GradientWritten(Model):
    def inner(self, x, labels):
        return x + 2 * x


class Seeded(Model):
    def inner(self, x, labels):
        torch.manual_seed(0)  # here
        return nn.functional.dropout(x, 0.1)


class Unseeded(Model):
    def inner(self, x, labels):
        return nn.functional.dropout(x, 0.1)


class OwnGenerator(Model):
    def inner(self, x, labels):
        generator = torch.Generator().manual_seed(0)
        return x * torch.rand(H, generator=generator)  # here


class Drawn(Model):
    def inner(self, x, labels):
        return x * torch.rand(H)


class Shuffled(Model):
    def inner(self, x, labels):
        return x[..., torch.randperm(H)]  # here


class DataRead(Model):
    def inner(self, x, labels):
        return x.data * 2  # here


class DetachedRead(Model):
    def inner(self, x, labels):
        return x.detach() * 2


class Inference(Model):
    def inner(self, x, labels):
        with torch._C._InferenceMode(True):
            y = x * 1
        return y * 1


class NoGrad(Model):
    def inner(self, x, labels):
        with torch.no_grad():
            y = x * 1
        return y * 1


PARAMETER, BUFFER, LABELS = (diagnose.WAYS_OUT[kind] for kind in ("parameter", "buffer", "batch"))
IN_FORWARD = "compute what the hook does in forward, or after backward"
MENDS = [
    *(Mend("state-mutated", PARAMETER, kind, ClampedCopy)
      for kind in (ParameterClamped, ParameterMoved, ParameterCopied)),
    Mend("state-mutated", BUFFER, Averaged, OfTheBatchAlone, line(Averaged.inner, 1)),
    Mend("state-mutated", BUFFER, BufferShifted, ShiftedAnew),
    Mend("state-mutated", "compute it without changing a buffer or an input", BufferReplaced, ShiftedAnew),
    Mend("state-mutated", LABELS, LabelsMasked, LabelsCopied),
    Mend("autocast-device", "give the model its dtype, as with model.to(torch.bfloat16), instead of autocast",
         AutocastToCuda, half, target="cuda"),
    Mend("reentrant-checkpoint", "checkpoint with use_reentrant=False", Reentrant, NotReentrant),
    *(Mend("gradient-hook", IN_FORWARD, kind, GradientDoubled)
      for kind in (HookInForward, HookOfAModuleInForward, HookOnAWeightInForward, SavedInHalf)),
    Mend("gradient-hook", IN_FORWARD, hook_on_a_module, GradientDoubled),
    Mend("gradient-inside", "write that gradient out in torch operators", GradientInside, GradientWritten),
    Mend("random-operator", "take that out of forward", Seeded, Unseeded),
    Mend("random-operator", "leave the generator out: draws follow from the run's seed and the number of the step",
         OwnGenerator, Drawn),
    Mend("random-operator", "draw with dropout, bernoulli, rand, randn, uniform, normal, exponential or randint",
         Shuffled, Drawn),
    Mend("data-dependent", "use .detach() instead of .data", DataRead, DetachedRead),
    Mend("gradient-gained", "use torch.no_grad() or .detach()", Inference, NoGrad, line(Model.forward)),
]  # fmt: skip


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: f"{mend.code}-{mend.refused.__name__}")
def test_the_fix_builds(mend, capfd):
    mend.holds(capfd)
