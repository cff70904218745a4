"""What a rank holds from one step to the next: parameters, their gradients, and the optimizer's state.

For n elements over N ranks (data parallel x sequence parallel):

    parameters in   parameter   gradient   AdamW                                     ZeRO 0   ZeRO 1
    bf16, f16       2 n         2 n        fp32 master, two fp32 moments             12 n     12 n / N
    f32             4 n         4 n        two fp32 moments                           8 n      8 n / N
    f64             8 n         8 n        two fp64 moments                          16 n     16 n / N

Method: mixed-precision Adam and its partition over ranks, ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054). Parameters
and gradients are whole on every rank, as our programs need them. It is what the loop of `autosp-aot run` holds
(`training/optimizer.py`); accumulating more than one micro-batch, that has sums of bf16 gradients in fp32 besides, 4 n.
"""

from dataclasses import dataclass
from math import prod

from autosp_aot.ir.program import ITEMSIZE, Program

OPTIMIZERS = ("adamw", "none", "host")
MOMENTS = 2


@dataclass(frozen=True)
class TrainingState:
    """Bytes on one rank; `host_bytes` is optimizer state in the machine's memory instead of the device's."""

    parameters: int
    gradients: int
    optimizer: int
    host_bytes: int = 0


def training_state(whole: Program, optimizer: str, zero: int, ranks: int, accumulate: int = 1) -> TrainingState:
    """The state of a step over `ranks` ranks in all; `optimizer` is adamw, host (AdamW in host memory) or none.

    Sums over `accumulate` micro-batches count as the optimizer's, on the device in any case.

    A tied parameter is one input of the step, so it counts once; one that gets no gradient has no optimizer state.
    Buffers count as parameters. Under ZeRO 1 a rank's share is rounded up.
    """
    inputs = {entry.value.name: entry.value for entry in whole.inputs if entry.kind in ("parameter", "buffer")}
    labels = {label.removeprefix("grad.") for section in whole.sections for label, _ in section.gives}
    trained = [value for name, value in inputs.items() if name in labels]
    held = sum(prod(value.sizes) * element_bytes(value.dtype) for value in trained) if optimizer != "none" else 0
    share = -(-held // ranks) if zero else held
    narrow = [value for value in trained if ITEMSIZE[value.dtype] < ITEMSIZE["f32"]]
    accumulates = accumulate > 1 and optimizer != "none"
    sums = sum(prod(value.sizes) for value in narrow) * ITEMSIZE["f32"] if accumulates else 0
    parameters, gradients = (sum(value.nbytes() for value in values) for values in (inputs.values(), trained))
    on_host = optimizer == "host"
    return TrainingState(parameters, gradients, sums + (0 if on_host else share), share if on_host else 0)


def element_bytes(dtype: str) -> int:
    """AdamW's state of one element: two moments in fp32 or wider, and an fp32 master of what is narrower."""
    wide = max(ITEMSIZE[dtype], ITEMSIZE["f32"])
    return MOMENTS * wide + (wide if ITEMSIZE[dtype] < wide else 0)
