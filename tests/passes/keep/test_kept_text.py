"""Which values of a small graph each policy keeps, and why."""

import pytest

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.passes.keep.policy import ATTENDED, CARRIES, LAST, ROOM, SENT, Keep
from tests.passes.texts import parsed

TEXT = """\
autosp program 1
ranks 2
layout cut6 = 0:3 3:6
layout cut2 = 0:1 1:2
parameter %g: f64[4] @ Replicate
batch %x: f64[1, 2, 3, 4] @ Shard(2, cut6)
tangent %t: f64[] @ Replicate
section forward takes ()
  %a: f64[1, 2, 3, 4] @ Shard(2, cut6) = aten.mul.Tensor(%x, %g)
  %a.whole: f64[1, 1, 6, 4] @ Shard(1, cut2) = all_to_all(%a)
  %b: f64[1, 1, 6, 4] @ Shard(1, cut2); _ = autosp.attention(%a.whole, %a.whole, %a.whole, [], None, 1, 0, scale=1.0)
  %b.shard: f64[1, 2, 3, 4] @ Shard(2, cut6) = all_to_all(%b)
  %c: f64[1, 2, 3, 4] @ Shard(2, cut6) = aten.tanh.default(%b.shard)
  %c.whole: f64[1, 1, 6, 4] @ Shard(1, cut2) = all_to_all(%c)
  %d: f64[1, 1, 6, 4] @ Shard(1, cut2); _ = autosp.attention(%c.whole, %c.whole, %c.whole, [], None, 1, 0, scale=1.0)
  %d.shard: f64[1, 2, 3, 4] @ Shard(2, cut6) = all_to_all(%d)
  %e: f64[1, 2, 3, 4] @ Shard(2, cut6) = aten.tanh.default(%d.shard)
gives (loss=%e)
section backward takes (%e)
  %grad.e: f64[1, 2, 3, 4] @ Shard(2, cut6) = aten.mul.Tensor(%e, %t)
gives (grad.e=%grad.e)
section sum_gradients takes (%grad.e)
gives (grad.e=%grad.e)
"""


FULL = {"a.whole": CARRIES, "c.whole": CARRIES, "d": LAST, "d.shard": LAST, "e": LAST}
SAC = FULL | {"b": ATTENDED, "b.shard": SENT}


@pytest.mark.parametrize(("policy", "kept"), [("none", SAC | {"a": ROOM, "c": ROOM}), ("sac", SAC), ("full", FULL)])
def test_a_policy_keeps_values_by_what_makes_them(policy, kept):
    assert Keep(BuildConfig(2, recompute=policy), lambda offload: ())(parsed(TEXT)).kept == kept
