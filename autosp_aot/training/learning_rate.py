"""The learning rate of each step: a linear rise, then constant, a cosine or a line down to a floor."""

from dataclasses import dataclass
from math import cos, pi

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Schedule:
    """Learning rates by the formulas of transformers' `constant_with_warmup`, `cosine_with_min_lr`, `polynomial`.

    With k from 0, w = `warmup` and n = `steps`:

        k < w    lr * k / w
        else     t = (k - w) / (n - w)
                 constant   lr
                 cosine     min_lr + (lr - min_lr) * (1 + cos(pi t)) / 2
                 linear     min_lr + (lr - min_lr) * (1 - t)
    """

    lr: float
    kind: str = "constant"
    steps: int = 0
    warmup: int = 0
    min_lr: float = 0.0

    def at(self, step: int) -> float:
        """The learning rate of step number `step`, from 0."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        if self.kind == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        left = (1 + cos(pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.min_lr + (self.lr - self.min_lr) * left
