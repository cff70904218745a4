"""What training holds, of programs small enough to count by hand."""

import pytest
import torch

from autosp_aot.commands.build.builder import capture_model
from autosp_aot.export.subject import Subject
from autosp_aot.ir.text import parse_program
from autosp_aot.memory.training_state import TrainingState, training_state
from autosp_aot.runtime.comm import Group
from autosp_aot.training.optimizer import AdamW
from examples import plain


def program(dtype: str):
    """A weight of 12 elements that is trained, and one of 5 that is frozen."""
    return parse_program(
        "autosp program 1\nranks 1\n"
        f"parameter %w: {dtype}[4, 3] @ Replicate\nparameter %frozen: {dtype}[5] @ Replicate\n"
        f"section step takes ()\n  %g: {dtype}[4, 3] @ Replicate = aten.neg.default(%w)\ngives (grad.w=%g)\n", {},
    )  # fmt: skip


@pytest.mark.parametrize("dtype, itemsize, held", [("bf16", 2, 12), ("f16", 2, 12), ("f32", 4, 8), ("f64", 8, 16)])
def test_bytes_of_a_parameter_its_gradient_and_the_optimizer_by_dtype(dtype, itemsize, held):
    found = training_state(program(dtype), "adamw", zero=0, ranks=8)
    assert found == TrainingState(parameters=17 * itemsize, gradients=12 * itemsize, optimizer=12 * held)


def test_zero_1_shares_the_optimizer_s_state_over_all_ranks_rounded_up():
    assert training_state(program("bf16"), "adamw", zero=1, ranks=8).optimizer == 18
    assert training_state(program("bf16"), "adamw", zero=1, ranks=7).optimizer == 21


def test_an_optimizer_on_the_host_takes_nothing_of_the_device():
    found = training_state(program("bf16"), "host", zero=1, ranks=8)
    assert (found.optimizer, found.host_bytes) == (0, 18)


@pytest.mark.parametrize("dtype, sums", [("bf16", 48), ("f32", 0), ("f64", 0)])
@pytest.mark.parametrize("optimizer", ["adamw", "host"])
def test_half_gradients_of_several_micro_batches_add_up_in_fp32_on_the_device(dtype, sums, optimizer):
    one, more = (training_state(program(dtype), optimizer, 1, 8, accumulate) for accumulate in (1, 3))
    assert (more.optimizer - one.optimizer, more.host_bytes) == (sums, one.host_bytes)


def test_without_an_optimizer_there_are_parameters_and_gradients():
    assert training_state(program("f32"), "none", zero=0, ranks=1) == TrainingState(17 * 4, 12 * 4, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("zero, accumulate", [(0, 1), (1, 1), (1, 2)])
def test_it_is_what_run_holds(dtype, zero, accumulate):
    model = plain.build_model(vocab_size=8, hidden_size=4, layers=1, heads=2, kv_heads=1, max_length=8, dtype=dtype)
    whole = capture_model(Subject(model, plain.example_batch(1, 4), "cpu")).whole
    optimizer = AdamW(model.parameters(), Group(0, 2, torch.device("cpu")), zero)
    if accumulate > 1:
        model(**plain.example_batch(1, 4)).backward()
        optimizer.accumulate()
    held = [(bucket.master, bucket.average, bucket.square, bucket.sums) for bucket in optimizer.buckets]
    moments = sum(tensor.nbytes for tensors in held for tensor in tensors if tensor is not None)
    found = training_state(whole, "adamw", zero, 2, accumulate)
    assert found.optimizer == moments
    assert found.parameters == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def test_tied_parameters_count_once():
    tied, untied = (
        capture_model(Subject(Tied(tie), {"tokens": torch.zeros(1, 4, dtype=torch.int64)}, "cpu")).whole
        for tie in (True, False)
    )
    one, two = (training_state(whole, "adamw", zero=0, ranks=1) for whole in (tied, untied))
    assert (two.parameters, two.gradients, two.optimizer) == (2 * one.parameters, 2 * one.gradients, 2 * one.optimizer)


class Tied(torch.nn.Module):
    def __init__(self, tie: bool):
        super().__init__()
        self.tokens, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
        if tie:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.tokens(tokens)).square().mean()
