"""The longest sequences that have to fit, planned: bf16, AdamW under ZeRO 1, 3 GiB of each device left to others.

    python -m benchmarks.planner          # minutes; prints a table and fails where a row does not fit
"""

import sys
import time
from dataclasses import dataclass

from autosp_aot.commands.plan.planning import Asked, Planner, Setting
from autosp_aot.ir.units import bytes_text, length_of
from autosp_aot.targets.devices import DEVICES, GIB
from benchmarks.build import MODEL, SHAPE

SHAPES = {
    "3B": dict(SHAPE, hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_hidden_layers=28),
    "8B": dict(SHAPE, num_hidden_layers=32),
    "13B": dict(SHAPE, hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=40,
                vocab_size=32000, num_hidden_layers=40),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A shape over `sp` devices; `once` wants no collective and no attention to be recomputed."""

    shape: str
    sp: int
    device: str
    length: str
    optimizer: str = "adamw"
    offload: str = "off"
    once: bool = False


ROWS = (
    Row("3B", 8, "h100", "512k"),
    Row("8B", 8, "h100", "256k", once=True),
    Row("8B", 8, "h100", "384k"),
    Row("13B", 8, "h100", "64k"),
    Row("8B", 8, "h100", "1M", offload="auto"),
    Row("8B", 1, "h200", "320k", "host"),
    Row("8B", 1, "h200", "1200k", "host", "auto"),
)


def main() -> int:
    print("| shape | sp | device | S | optimizer | offload | planned peak | recomputed FLOPs "
          "| seconds to plan | fits |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    return 0 if all([planned(row) for row in ROWS]) else 1


def planned(row: Row) -> bool:
    """Print a row; whether it fits."""
    device = DEVICES[row.device]
    setting = Setting(device, device.memory_bytes, 3 * GIB, optimizer=row.optimizer, offload=row.offload,
                      recompute="sac" if row.once else "auto")  # fmt: skip
    start = time.perf_counter()
    point = Planner(Asked(MODEL, 1, SHAPES[row.shape], setting)).point(row.sp, length_of(row.length))
    again = point.recomputed_flops / max(point.flops, 1)
    print(f"| {row.shape} | {row.sp} | {row.device} | {row.length} | {row.optimizer} | {row.offload} "
          f"| {bytes_text(point.peak_bytes)} of {bytes_text(device.memory_bytes - 3 * GIB)} | {again:.1%} "
          f"| {time.perf_counter() - start:.0f} | {'yes' if point.fits else 'no'} |", flush=True)  # fmt: skip
    return point.fits


if __name__ == "__main__":
    sys.exit(main())
