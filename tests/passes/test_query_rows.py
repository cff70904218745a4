"""Query rows: attention with fewer heads than ranks, over heads and rows as one dim."""

from autosp_aot.passes.query_rows import QueryRows
from tests.passes.texts import after, parsed

SCORED = 'scale=0.5, score=["aten.add.Tensor", "s", "v0"])'
HEADER = """\
autosp program 1
ranks 1
batch %q: f32[1, 2, 4, 8] @ Replicate
batch %k: f32[1, 1, 4, 8] @ Replicate
batch %bias: f32[1, 2, 4, 4] @ Replicate
section step takes ()
"""
BEFORE = f"""\
{HEADER}  %o: f32[1, 2, 4, 8] @ Replicate; %l: f32[1, 2, 4] @ Replicate = \
autosp.attention(%q, %k, %k, [%bias], None, 2, 0, {SCORED}
  %g: f32[1, 2, 4, 8] @ Replicate; %gk: f32[1, 1, 4, 8] @ Replicate; _ = \
autosp.attention_backward(%o, %q, %k, %k, %o, %l, None, [%bias], None, 2, 0, {SCORED}
gives (loss=%o, grad.q=%g, grad.k=%gk)
"""
AFTER = f"""\
{HEADER}  %o.rows_0: f32[1, 8, 8] @ Replicate = aten.reshape.default(%q, [1, 8, 8])
  %o.rows_3: f32[1, 8, 4] @ Replicate = aten.reshape.default(%bias, [1, 8, 4])
  %o.rows: f32[1, 8, 8] @ Replicate; %l.rows: f32[1, 8] @ Replicate = \
autosp.attention_rows(%o.rows_0, %k, %k, [%o.rows_3], None, 2, 4, 0, {SCORED}
  %o: f32[1, 2, 4, 8] @ Replicate = aten.reshape.default(%o.rows, [1, 2, 4, 8])
  %l: f32[1, 2, 4] @ Replicate = aten.reshape.default(%l.rows, [1, 2, 4])
  %g.rows_0: f32[1, 8, 8] @ Replicate = aten.reshape.default(%o, [1, 8, 8])
  %g.rows_1: f32[1, 8, 8] @ Replicate = aten.reshape.default(%q, [1, 8, 8])
  %g.rows_4: f32[1, 8, 8] @ Replicate = aten.reshape.default(%o, [1, 8, 8])
  %g.rows_5: f32[1, 8] @ Replicate = aten.reshape.default(%l, [1, 8])
  %g.rows_7: f32[1, 8, 4] @ Replicate = aten.reshape.default(%bias, [1, 8, 4])
  %g.rows: f32[1, 8, 8] @ Replicate; %gk: f32[1, 1, 4, 8] @ Replicate; _ = \
autosp.attention_rows_backward(%g.rows_0, %g.rows_1, %k, %k, %g.rows_4, %g.rows_5, None, [%g.rows_7], None, 2, 4, 0, \
{SCORED}
  %g: f32[1, 2, 4, 8] @ Replicate = aten.reshape.default(%g.rows, [1, 2, 4, 8])
gives (loss=%o, grad.q=%g, grad.k=%gk)
"""


def test_what_has_a_dim_of_heads_and_one_of_rows_is_reshaped_keys_and_values_stay():
    assert after(QueryRows(3), parsed(BEFORE)) == AFTER


def test_as_many_heads_as_ranks_stay_heads():
    assert after(QueryRows(2), parsed(BEFORE)) == BEFORE
