"""What `run` says of its steps: a line each on stdout, JSON lines in a file, a bar where stderr is a terminal."""

import json
import math
import sys
from pathlib import Path

from autosp_aot.errors import AutospError, Problem


class Log:
    """Lines of `steps` steps, numbered from 1; JSON lines go to `metrics`.

    Raises AutospError (`output-unwritable`) where those cannot be written.
    """

    def __init__(self, steps: int, metrics: Path | None):
        self.steps, self.metrics = steps, metrics
        try:
            self.file = metrics.open("w") if metrics is not None else None
        except OSError as error:
            raise self._unwritable(error) from error

    def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens_per_s: float) -> None:
        """Say how step number `step` went; a loss that is not finite is said to be."""
        remark = "" if math.isfinite(loss) else "  (not finite)"
        line = f"step {step:<5} loss {loss:<9.5f} grad_norm {grad_norm:<9.4f} lr {lr:<9.3g} tokens/s {tokens_per_s:.0f}"
        self._say(line + remark, step)
        self._write({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_s": tokens_per_s})

    def evaluation(self, step: int, loss: float) -> None:
        """Say what the loss of held-out batches is after step number `step`."""
        remark = "" if math.isfinite(loss) else "  (not finite)"
        self._say(f"step {step:<5} eval_loss {loss:<9.5f}".rstrip() + remark, step)
        self._write({"step": step, "eval_loss": loss})

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _say(self, line: str, step: int) -> None:
        self._progress(None)
        print(line, flush=True)
        self._progress(step)

    def _write(self, row: dict[str, float]) -> None:
        if self.file is None:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        try:
            print(json.dumps(finite), file=self.file, flush=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> AutospError:
        return AutospError(Problem(
            "output-unwritable", f"--metrics {self.metrics} cannot be written", why=error.strerror or str(error),
            fix="give a file on a disk with room, or leave --metrics out: the same numbers are on stdout",
        ))  # fmt: skip

    def _progress(self, done: int | None) -> None:
        """Draw the bar; None wipes it away, as the last step does."""
        if not sys.stderr.isatty():
            return
        filled = 0 if done is None else 30 * done // self.steps
        bar = "" if done in (None, self.steps) else f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{self.steps}"
        print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)
