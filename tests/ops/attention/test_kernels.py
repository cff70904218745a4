"""Every kernel against the softmax of all scores in fp64, differentiated by autograd."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autosp_aot.ops.attention.arguments import KernelCall, Saved, Scoring
from autosp_aot.ops.attention.blockwise import blockwise, blockwise_backward
from autosp_aot.ops.table import OURS
from autosp_aot.targets.table import CPU, CUDA, TARGETS

SCALE = 0.7


def reference(q, k, v, causal, group=1, first_head=0):
    """Output and lse; key/value heads are repeated for their query heads, one by one."""
    served = [(first_head + head) // group - first_head // group for head in range(q.shape[1])]
    scores = q @ k[:, served].transpose(-1, -2) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v[:, served], scores.logsumexp(-1)


def called(op, *args, **scoring):
    """The kernel's results, of operands laid out as it demands."""
    return OURS[op].kernel(*OURS[op].laid_out(args, scoring, args[0].device.type), **scoring)


def attention(q, k, v, scale, causal, *tail):
    return called("autosp.attention", q, k, v, [], None, *tail, scale=scale, causal=causal)


def attention_backward(grad_out, q, k, v, out, lse, scale, causal, *tail):
    given = grad_out, q, k, v, out, lse, None, [], None
    return called("autosp.attention_backward", *given, *tail, scale=scale, causal=causal)


def attention_rows(q, k, v, scale, causal, *tail):
    return called("autosp.attention_rows", q, k, v, [], None, *tail, scale=scale, causal=causal)


def attention_rows_backward(grad_out, q, k, v, out, lse, scale, causal, *tail):
    given = grad_out, q, k, v, out, lse, None, [], None
    return called("autosp.attention_rows_backward", *given, *tail, scale=scale, causal=causal)


def tensors(heads, kv_heads, rows, keys, width=4, v_width=4):
    """q, k, v and the gradient of the output, of two batch rows; fp64."""
    torch.manual_seed(0)
    shapes = (heads, rows, width), (kv_heads, keys, width), (kv_heads, keys, v_width), (heads, rows, v_width)
    return [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]


def gradients(out, grad_out, *leaves):
    return torch.autograd.grad(out, leaves, grad_out)


def assert_close(found, expected, limit=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().amax() <= limit * max(1, b.abs().amax()) if b.numel() else True


def assert_like_reference(q, k, v, grad_out, causal, group=1, first_head=0):
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = reference(*leaves, causal, group, first_head)
    found = attention(q, k, v, SCALE, causal, group, first_head)
    assert_close(found, expected)
    grads = attention_backward(grad_out, q, k, v, *found, SCALE, causal, group, first_head)
    assert_close(grads, gradients(expected[0], grad_out, *leaves))


@pytest.mark.parametrize("v_width", [4, 7, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "group", "first_head"), [
    (3, 3, 1, 0), (3, 3, 1, 5),                 # a key/value head each
    (4, 2, 2, 0), (3, 2, 2, 1), (2, 2, 2, 3),   # groups that begin and end in the middle
    (4, 1, 4, 0), (2, 1, 4, 5), (6, 3, 4, 3),   # one, part of one, and the end of one to the begin of another
])  # fmt: skip
def test_heads_of_any_interval_find_their_key_value_heads(heads, kv_heads, group, first_head, causal, v_width):
    assert_like_reference(*tensors(heads, kv_heads, 5, 5, v_width=v_width), causal, group, first_head)


@pytest.mark.parametrize("v_width", [4, 6])
@pytest.mark.parametrize(("rows", "keys"), [(3, 8), (8, 3), (1, 1)])
def test_queries_see_all_keys_where_their_numbers_differ(rows, keys, v_width):
    assert_like_reference(*tensors(4, 2, rows, keys, v_width=v_width), False, 2, 0)


@pytest.mark.parametrize(("rows", "keys", "causal"), [
    (9, 9, True), (9, 9, False), (4, 11, False), (11, 4, False), (11, 6, True), (6, 11, True), (4, 4, True),
])  # fmt: skip
def test_blocks_of_rows_and_keys_add_up(monkeypatch, rows, keys, causal):
    monkeypatch.setitem(TARGETS, "cpu", replace(CPU, attention_block=4))
    q, k, v, grad_out = tensors(2, 2, rows, keys, v_width=3)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = reference(*leaves, causal)
    call = KernelCall(q, k, v, [], Scoring(SCALE, causal))
    found = blockwise(call)
    assert_close(found, expected)
    grads = blockwise_backward(call, Saved(grad_out, *found, None))
    assert_close(grads, gradients(expected[0], grad_out, *leaves))


def test_more_rows_than_a_block_are_several_blocks():
    rows = 2 * CPU.attention_block + 3
    assert_like_reference(*tensors(1, 1, rows, rows, width=2, v_width=3), True)


def test_scores_beyond_the_range_of_exp_do_not_overflow(monkeypatch):
    monkeypatch.setitem(TARGETS, "cpu", replace(CPU, attention_block=2))
    q, k, v, _ = tensors(1, 1, 5, 5)
    q *= 1000
    assert_close(blockwise(KernelCall(q, k, v, [], Scoring(SCALE, True))), reference(q, k, v, True))


ROWS, HEADS, GROUP = 3, 4, 2


@pytest.mark.parametrize("v_width", [4, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_any_interval_of_heads_and_rows_is_that_part_of_the_whole(causal, v_width):
    q, k, v, grad_out = tensors(HEADS, HEADS // GROUP, ROWS, ROWS, v_width=v_width)
    for start in range(HEADS * ROWS):
        for count in range(1, HEADS * ROWS - start + 1):
            assert_interval(q, k, v, grad_out, start, count, causal)


def assert_interval(q, k, v, grad_out, start, count, causal):
    kv = slice(start // ROWS // GROUP, (start + count - 1) // ROWS // GROUP + 1)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = [whole.flatten(1, 2)[:, start : start + count] for whole in reference(*leaves, causal, GROUP)]
    mine, grad = (whole.flatten(1, 2)[:, start : start + count] for whole in (q, grad_out))
    given = mine, k[:, kv], v[:, kv]
    found = attention_rows(*given, SCALE, causal, GROUP, ROWS, start)
    assert_close(found, expected)
    grads = attention_rows_backward(grad, *given, *found, SCALE, causal, GROUP, ROWS, start)
    grad_q, grad_k, grad_v = gradients(expected[0], grad, *leaves)
    assert_close(grads, (grad_q.flatten(1, 2)[:, start : start + count], grad_k[:, kv], grad_v[:, kv]))


def test_rows_see_keys_of_another_number():
    q, k, v, grad_out = tensors(HEADS, HEADS // GROUP, ROWS, 7)
    for start, count in ((0, 12), (2, 6), (7, 1)):
        assert_interval(q, k, v, grad_out, start, count, False)


def test_a_rank_without_heads_makes_empties_and_adds_nothing():
    q, k, v, grad_out = tensors(0, 1, 5, 5, v_width=6)
    out, lse = attention(q, k, v, SCALE, True, 2, 2)
    assert (out.shape, lse.shape) == ((2, 0, 5, 6), (2, 0, 5))
    grads = attention_backward(grad_out, q, k, v, out, lse, SCALE, True, 2, 2)
    assert_close(grads, [torch.zeros_like(tensor) for tensor in (q, k, v)])


def test_a_rank_without_key_value_heads_makes_empties():
    q, k, v, grad_out = tensors(0, 0, 5, 5)
    out, lse = attention(q, k, v, SCALE, True, 1, 0)
    grads = attention_backward(grad_out, q, k, v, out, lse, SCALE, True, 1, 0)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_a_rank_without_rows_makes_empties_and_adds_nothing():
    _, k, v, _ = tensors(1, 1, 5, 5, v_width=6)
    q, grad_out = k.new_empty(2, 0, 4), k.new_empty(2, 0, 6)
    out, lse = attention_rows(q, k, v, SCALE, True, 2, 5, 10)
    assert (out.shape, lse.shape) == ((2, 0, 6), (2, 0))
    grads = attention_rows_backward(grad_out, q, k, v, out, lse, SCALE, True, 2, 5, 10)
    assert_close(grads, [torch.zeros_like(tensor) for tensor in (q, k, v)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v_width", [4, 6])
@pytest.mark.parametrize("heads", [4, 0])
def test_half_dtypes_keep_lse_in_fp32(dtype, v_width, heads):
    q, k, v, grad_out = (tensor.to(dtype) for tensor in tensors(heads, 2, 5, 5, v_width=v_width))
    out, lse = attention(q, k, v, SCALE, True, 2, 0)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    grads = attention_backward(grad_out, q, k, v, out, lse, SCALE, True, 2, 0)
    assert [grad.dtype for grad in grads] == [dtype] * 3
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    expected = reference(*leaves, True, 2)
    assert_close((out, lse), expected, 2e-2)
    assert_close(grads, gradients(expected[0], grad_out.double(), *leaves), 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [7, 0])
def test_rows_of_half_dtypes_keep_lse_in_fp32(dtype, count):
    q, k, v, grad_out = (tensor.to(dtype) for tensor in tensors(HEADS, HEADS // GROUP, ROWS, ROWS))
    start, kv = 4, slice(0, 2)
    mine, grad = (whole.flatten(1, 2)[:, start : start + count] for whole in (q, grad_out))
    out, lse = attention_rows(mine, k[:, kv], v[:, kv], SCALE, True, GROUP, ROWS, start)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    grads = attention_rows_backward(grad, mine, k[:, kv], v[:, kv], out, lse, SCALE, True, GROUP, ROWS, start)
    assert [grad.dtype for grad in grads] == [dtype] * 3
    whole = reference(*(tensor.double() for tensor in (q, k, v)), True, GROUP)
    assert_close((out, lse), [part.flatten(1, 2)[:, start : start + count] for part in whole], 2e-2)


def head_dim_outside(tensor):
    """The same elements with the head dim as the slowest but the batch."""
    return tensor.movedim(-1, 1).contiguous().movedim(1, -1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "group"), [(3, 3, 1), (4, 2, 2)])
def test_a_head_dim_that_is_not_innermost_is_read_right(heads, kv_heads, group, causal):
    assert_like_reference(*map(head_dim_outside, tensors(heads, kv_heads, 5, 5)), causal, group)


@pytest.mark.parametrize("causal", [True, False])
def test_so_it_is_in_intervals_of_heads_and_rows(causal):
    q, k, v, grad_out = map(head_dim_outside, tensors(HEADS, HEADS // GROUP, ROWS, ROWS))
    for start, count in ((0, HEADS * ROWS), (2, 6), (7, 1)):
        assert_interval(q, k, v, grad_out, start, count, causal)


class LseOfCuda(TorchDispatchMode):
    """What CUDA's flash backward is given as lse, as (shape, whether it is dense), by torch's meta kernels."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
            self.found.append((tuple(args[5].shape), args[5].is_contiguous()))
        return func(*args, **kwargs or {})


@pytest.fixture
def meta_is_cuda(monkeypatch):
    """Tensors without data stand for CUDA's: torch has its kernels' layouts."""
    monkeypatch.setitem(TARGETS, "meta", CUDA)


def on_meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_cuda_is_given_lse_as_its_backward_reads_it(meta_is_cuda):
    q, k, grad_out = on_meta(2, 4, 16, 8), on_meta(2, 2, 16, 8), on_meta(2, 4, 16, 8)
    out, lse = attention(q, k, k, SCALE, True, 2, 0)
    assert lse.is_contiguous()
    with LseOfCuda() as seen:
        attention_backward(grad_out, q, k, k, out, lse, SCALE, True, 2, 0)
    assert seen.found == [((2, 2, 16), True)] * 2


def test_so_it_is_for_intervals_of_heads_and_rows(meta_is_cuda):
    q, k = on_meta(2, 24, 8), on_meta(2, 2, 16, 8)
    out, lse = attention_rows(q, k, k, SCALE, False, 1, 16, 0)
    with LseOfCuda() as seen:
        attention_rows_backward(q, q, k, k, out, lse, SCALE, False, 1, 16, 0)
    assert seen.found == [((2, 1, 16), True), ((2, 1, 8), True)]
