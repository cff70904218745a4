"""Loss and gradients of the unsharded model, and how far others are from them.

For each gradient `||g - ref|| / max(||ref||, 1e-4 * r)`, r the root mean square of all gradient norms; for the loss the
relative difference.
"""

import torch
from torch import Tensor, nn


def eager(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the unsharded model."""
    model.zero_grad()
    result = model(**batch)
    loss = result if isinstance(result, Tensor) else result.loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(reference, loss: Tensor, gradients: dict[str, Tensor]) -> float:
    """The worst relative difference of the loss and of every gradient."""
    wanted_loss, wanted = reference
    assert set(gradients) == set(wanted), "other parameters have gradients"
    typical = torch.stack([g.norm() for g in wanted.values()]).square().mean().sqrt()
    errors = [(loss - wanted_loss).abs() / wanted_loss.abs()]
    errors += [(gradients[n] - g).norm() / torch.maximum(g.norm(), 1e-4 * typical) for n, g in wanted.items()]
    found = [float(error) for error in errors]
    return max(error if error == error else float("inf") for error in found)
