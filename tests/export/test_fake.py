"""Copies of a model: functions that it holds, hooks and partials see the copy, whatever they close over."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autosp_aot.export.fake import TooLarge, at_most, fake_copy, weightless
from tests.export.mend import H, Model, made, trains_as_eager


class Held(Model):
    """`f` is set up from outside, a function of the kind that is tried."""

    def inner(self, x, labels):
        return self.f(x)


def scaled(model, x):
    return x * model.gain


def a_lambda(model):
    model.f = lambda x: x * model.gain


def a_partial(model):
    model.f = functools.partial(scaled, model)


def a_function_in_a_function(model):
    def outer():
        def inner(x, gain=model.gain):
            return x * gain

        return inner

    model.f = outer()


def a_default(model):
    model.f = lambda x, by=model: x * by.gain


def a_cached_function(model):
    model.f = functools.lru_cache(None)(lambda x: x * model.gain)


def a_wrapped_function(model):
    @functools.wraps(scaled)
    def wrapper(x):
        return scaled(model, x)

    model.f = wrapper


def a_weak_reference(model):
    itself = weakref.ref(model)
    model.f = lambda x: x * itself().gain


def a_proxy(model):
    itself = weakref.proxy(model)
    model.f = lambda x: x * itself.gain


def functions_in_a_list(model):
    fs = model.fs = [lambda x: x * model.gain, lambda x: x + model.gain]
    model.f = lambda x: model.fs[1](fs[0](x))


def functions_in_a_dict(model):
    model.ops = {"scaled": lambda x: x * model.gain}
    model.f = lambda x: model.ops["scaled"](x)


def an_object(model):
    class Scaling:
        def __init__(self, model):
            self.model = model

        def __call__(self, x):
            return x * self.model.gain

    model.f = Scaling(model)


def a_forward_of_another_module(model):
    before = model.embedding.forward
    model.embedding.forward = lambda tokens: before(tokens) * model.gain
    model.f = lambda x: x


def a_forward_hook(model):
    kept = {}
    model.embedding.register_forward_hook(lambda module, args, result: kept.update(x=result))
    model.f = lambda x: x + kept["x"] * model.gain


def a_forward_pre_hook(model):
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * model.gain,))
    model.f = lambda x: x


def a_hook_on_the_model(model):
    model.register_forward_hook(lambda module, args, loss: loss + module.gain.square().mean())
    model.f = lambda x: x


def a_method_of_another(model):
    other = Model()
    other.gain = model.gain
    model.other, model.f = other, functools.partial(scaled, other)


def a_recursive_function(model):
    def again(x, times):
        return x if times == 0 else again(x * model.gain, times - 1)

    model.f = lambda x: again(x, 3)


KINDS = (
    a_lambda, a_partial, a_function_in_a_function, a_default, a_cached_function, a_wrapped_function, a_weak_reference,
    a_proxy, functions_in_a_list, functions_in_a_dict, an_object, a_forward_of_another_module, a_forward_hook,
    a_forward_pre_hook, a_hook_on_the_model, a_method_of_another, a_recursive_function,
)  # fmt: skip


def of(set_up) -> nn.Module:
    model = made(Held)
    set_up(model)
    return model


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_the_model_holds_is_captured_as_methods_are(kind):
    trains_as_eager(of(kind))


def test_a_copy_leaves_functions_alone_that_do_not_see_the_model():
    model = of(lambda model: setattr(model, "f", torch.tanh))
    model.g = plain = lambda x: 2 * x
    copied = fake_copy(model, FakeTensorMode())
    assert copied.f is torch.tanh and copied.g is plain


def test_without_weights_one_memory_stays_one_and_one_parameter_one():
    with weightless() as counted:
        tied = nn.Linear(H, H, bias=False)
        tied.again = tied.weight
        tied.other = nn.Linear(H, H, bias=False)
        tied.other.weight.data = tied.weight.data
        real = torch.ones(2, H)
        tied.one, tied.two = nn.Parameter(real[0]), nn.Parameter(real[1])
    assert tied.again is tied.weight and len(list(tied.parameters())) == 4
    assert tied.other.weight.untyped_storage()._cdata == tied.weight.untyped_storage()._cdata
    assert tied.one.untyped_storage()._cdata == tied.two.untyped_storage()._cdata and tied.two.storage_offset() == H
    assert counted.nbytes == 4 * (2 * H * H + 2 * H)
    assert all(parameter.is_meta for parameter in tied.parameters())


def test_parameters_may_take_so_many_bytes_and_no_more():
    with at_most(4 * H * H):
        linear = nn.Linear(H, H, bias=False)
        linear.again = linear.weight
    with pytest.raises(TooLarge), at_most(4 * H * H):
        nn.Linear(H, H)
