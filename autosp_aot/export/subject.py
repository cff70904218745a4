"""A model to be captured: copies of it without weights, batches for them, and what holds while forward runs."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction

from autosp_aot.artifact.batches import Constant, tensors_of
from autosp_aot.export.diagnose import backward_of, diagnosed
from autosp_aot.export.fake import fake_copy
from autosp_aot.export.keeping import buffer_slots, slots
from autosp_aot.export.loss import LossOnly, forward_at
from autosp_aot.export.settled import settled
from autosp_aot.export.watch import watched


@dataclass(frozen=True)
class Subject:
    """The user's model, a flat batch, and the kind of device that the program is for.

    `prepared` is applied to each copy: the model in the mode in which it is captured.
    """

    model: nn.Module
    batch: Mapping[str, Tensor | Constant]
    target: str
    prepared: Callable[[nn.Module], nn.Module] = lambda model: model

    @property
    def place(self) -> str:
        return forward_at(self.model)

    def copy(self, values: bool = True) -> tuple[LossOnly, FakeTensorMode]:
        """A copy of the model with fake parameters, returning its loss; the model itself is left alone.

        With `values` its buffers and other tensors are real; without, all are fake, and literals alone are not.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=not values)
        model = LossOnly(self.prepared(fake_copy(self.model, mode)), self.batch)
        if not values:
            for slot in (*buffer_slots(model), *slots(model)):
                if isinstance(slot.value, Tensor) and not isinstance(slot.value, FakeTensor):
                    slot.put(mode.from_tensor(slot.value))
        return model, mode

    def inputs(self, mode: FakeTensorMode) -> dict[str, Tensor]:
        """New fake tensors in place of the batch's."""
        return {name: mode.from_tensor(torch.empty_like(tensor)) for name, tensor in tensors_of(self.batch).items()}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Forward may run while it holds; what is wrong with that is a BuildError with the user's line."""
        with watched(self.target), diagnosed(self.place), settled(), silence():
            yield

    def gradients(self, model: LossOnly, loss: Tensor, *modes: contextlib.AbstractContextManager) -> list[Tensor]:
        """Run the backward of a loss in these modes, the first outermost: the gradients there are, in a fixed order.

        None where all of backward is torch's own: then it follows from forward.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not any(isinstance(step, BackwardCFunction) for step in backward_of(loss)):
            return []
        with diagnosed(self.place), settled(), silence(), contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]

    def loss(self, model: LossOnly, inputs: Mapping[str, Tensor], *modes: contextlib.AbstractContextManager) -> Tensor:
        """Run forward in these modes, the first outermost."""
        with self.running(), contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return model(**inputs)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """While it holds nothing is printed: torch logs nothing, such as the graph in which an error was, nothing warns,
    and what forward prints or logs of tensors without values is dropped."""
    known = logging.root.manager.loggerDict
    torchs = (known[name] for name in list(known) if name.partition(".")[0] == "torch")
    loggers = [logger for logger in torchs if isinstance(logger, logging.Logger) and not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    raising, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.raiseExceptions = raising
        for logger in loggers:
            logger.disabled = False
