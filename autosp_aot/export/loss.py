"""The loss in what forward returns, and the user's model as a module that returns nothing else."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autosp_aot.artifact.batches import Constant, constants_of, nested
from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.user_code import defined_at

PARTS = "say how its parts make one number, as with .mean() or .sum()"
LOSS = """compute the loss in forward, as with cross_entropy(logits.flatten(0, 1), labels.flatten()), and return it: \
alone, first, or as .loss or ['loss']"""


class LossOnly(nn.Module):
    """The user's model, returning its loss alone. Takes the tensors of a flat batch, whose constants it holds."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor | Constant]):
        super().__init__()
        self.model = model
        self._autosp_batch = tuple(batch), constants_of(batch)  # under a name that no model has an attribute of

    def forward(self, **tensors: Tensor) -> Tensor:
        names, constants = self._autosp_batch
        values = constants | tensors
        return loss_of(self.model(**nested({name: values[name] for name in names})), forward_at(self.model))


def forward_at(model: nn.Module) -> str:
    """The line where the model's forward begins."""
    return defined_at(model.forward) or "forward"


def loss_of(result, place: str) -> Tensor:
    """The loss of what a model returned: its part called `loss`; a scalar of a floating dtype, or a tuple's first part
    that is one; or the only such part.

    Raises BuildError (`no-loss`) where there is none or it is not clear which; `place` is where forward begins.
    """
    in_mapping = isinstance(result, Mapping) and "loss" in result
    called = result["loss"] if in_mapping else getattr(result, "loss", result)
    first = next(iter(result), None) if isinstance(result, (tuple, list)) else result
    parts = [part for part in tree_leaves(vars(result) if hasattr(result, "__dict__") else result) if _is_scalar(part)]
    if called is not result:
        candidates = [called]
    else:
        candidates = [first] if _is_scalar(first) else parts
    if len(candidates) == 1 and _is_scalar(candidates[0]):
        return candidates[0]
    if called is not result:
        returned = f"as its loss {_said(called)}"
    elif parts:
        returned = f"{len(parts)} scalars, and calls none of them loss"
    else:
        returned = f"no floating scalar: {_said(result)}"
    raise BuildError(Problem(
        "no-loss", f"forward returns {returned}", place, "training needs one number to differentiate",
        PARTS if _is_vector(called) and (called is not result or called.dim() == 1) else LOSS,
    ))  # fmt: skip


def _is_scalar(part) -> bool:
    return isinstance(part, Tensor) and part.dim() == 0 and part.dtype.is_floating_point


def _is_vector(part) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0 and part.is_floating_point()


def _said(part) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
    inside = part.values() if isinstance(part, Mapping) else part if isinstance(part, (tuple, list)) else ()
    return f"{type(part).__name__}({', '.join(map(_said, inside))})"
