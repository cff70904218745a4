"""Release: a `free` right after the last use, in sections and bodies; inputs and results stay."""

from autosp_aot.passes.release import Release
from tests.passes.texts import after, parsed

BEFORE = """\
autosp program 1
ranks 1
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
section forward takes ()
  %a: f32[4, 4] @ Replicate = aten.mm.default(%x, %w)
  %b: f32[4, 4] @ Replicate = aten.exp.default(%a)
  %unread: f32[4, 4] @ Replicate = aten.neg.default(%b)
  %loss: f32[] @ Replicate = aten.sum.default(%b)
gives (loss=%loss)
section backward takes (%a)
  %g: f32[4, 4] @ Replicate = aten.mm.default(%a, %a)
gives (grad.w=%g)
"""
AFTER = """\
autosp program 1
ranks 1
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
section forward takes ()
  %a: f32[4, 4] @ Replicate = aten.mm.default(%x, %w)
  %b: f32[4, 4] @ Replicate = aten.exp.default(%a)
  %unread: f32[4, 4] @ Replicate = aten.neg.default(%b)
  free(%unread)
  %loss: f32[] @ Replicate = aten.sum.default(%b)
  free(%b)
gives (loss=%loss)
section backward takes (%a)
  %g: f32[4, 4] @ Replicate = aten.mm.default(%a, %a)
  free(%a)
gives (grad.w=%g)
"""
TILED = """\
autosp program 1
ranks 1
layout two = 0:2 2:4
batch %x: f32[4, 4] @ Replicate
section step takes ()
  %y: f32[4, 4] @ Replicate = tiles(%x) in 2
    %tile.x: f32[2, 4] @ Shard(0, two) = shard(%x)
    %tile.h: f32[2, 4] @ Shard(0, two) = aten.neg.default(%tile.x)
    %tile.y: f32[2, 4] @ Shard(0, two) = aten.neg.default(%tile.h)
  gives (%tile.y)
gives (loss=%y)
"""


def test_every_value_is_released_after_its_last_use():
    assert after(Release(), parsed(BEFORE)) == AFTER


def test_what_a_tile_makes_is_released_in_it():
    lines = after(Release(), parsed(TILED)).splitlines()
    assert [line.strip() for line in lines if "free" in line] == ["free(%tile.x)", "free(%tile.h)"]
