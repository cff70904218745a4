"""Losses as models write them: loss and every gradient of every rank against eager, and no logits gathered."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.eager import difference, eager
from tests.steps import equal_to_eager, gathers, sharded

B, H, V = 2, 8, 17
LONG, SHORT = 13, 3


class Model(nn.Module):
    """Tokens to hidden states to logits, and a loss of them."""

    def __init__(self, loss):
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(V, H), nn.LayerNorm(H), nn.Linear(H, V)
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor, **more) -> Tensor:
        hidden = self.norm(self.tokens(input_ids))
        return self.loss(hidden, self.head(hidden), labels, **more)


def shifted(hidden, logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def entropy(**options):
    """Cross entropy of labels that were shifted before, as rows."""
    return lambda hidden, logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options).sum()


def classes_first(**options):
    return lambda hidden, logits, labels: F.cross_entropy(logits.transpose(1, 2), labels, **options).sum()


def own_mean(hidden, logits, labels):
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    valid = (labels != -100).flatten().to(logits.dtype)
    return (each * valid).sum() / valid.sum().clamp(min=1)


def gathered(hidden, logits, labels):
    scores = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(scores * (labels >= 0)).sum() / (labels >= 0).sum()


def soft(hidden, logits, labels):
    targets = F.one_hot(labels.clamp(min=0), V).to(logits.dtype) * 0.9 + 0.1 / V
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))


def with_z(hidden, logits, labels):
    return shifted(hidden, logits, labels) + 1e-2 * logits.logsumexp(-1).square().mean()


def several_shifts(hidden, logits, labels):
    rolled = [labels.roll(-shift, 1) for shift in (1, 2)]
    losses = [F.cross_entropy(logits.flatten(0, 1), target.flatten()) for target in rolled]
    further = F.cross_entropy(logits[:, :-3].flatten(0, 1), labels[:, 3:].flatten(), reduction="sum")
    return losses[0] + 0.3 * losses[1] + 0.1 * further


def transformers_own(hidden, logits, labels, num_items_in_batch=None):
    return ForCausalLMLoss(logits, labels, V, num_items_in_batch=num_items_in_batch)


def distilled(hidden, logits, labels):
    teacher = (logits.flip(0) * 0.5).detach()
    student, wanted = (logits / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    plain = (wanted.exp() * (wanted - student)).sum(-1)
    valid = labels != -100
    return (plain * valid).sum() / valid.sum() + F.kl_div(student, wanted, log_target=True, reduction="batchmean")


def auxiliary(hidden, logits, labels):
    chosen = logits.softmax(-1).topk(2, -1)
    load = F.one_hot(chosen.indices, V).to(logits.dtype).mean((0, 1, 2))
    balance = V * (load * logits.softmax(-1).mean((0, 1))).sum()
    return shifted(hidden, logits, labels) + 0.1 * balance


def focal(hidden, logits, labels):
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def regression(loss, **options):
    """A loss of hidden states against a target made of the tokens' embeddings two rows on."""
    return lambda hidden, logits, labels: loss(hidden, hidden.flip(0).detach() * 0.5, **options).sum()


def binary(loss, **options):
    def of(hidden, logits, labels):
        targets = F.one_hot(labels.clamp(min=0), V).to(logits.dtype)
        scores = logits.sigmoid() if loss is F.binary_cross_entropy else logits
        return loss(scores, targets, **options)

    return of


WEIGHT = torch.linspace(0.1, 2, V, dtype=torch.float64)
LOSSES = {
    "auxiliary": auxiliary,
    "binary": binary(F.binary_cross_entropy),
    "binary of logits": binary(F.binary_cross_entropy_with_logits),
    "binary of logits, weighted": binary(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
    "classes first": classes_first(),
    "classes first, each": classes_first(reduction="none"),
    "classes first, weighted": classes_first(weight=WEIGHT),
    "distilled": distilled,
    "each": entropy(reduction="none"),
    "focal": focal,
    "gathered": gathered,
    "huber": regression(F.huber_loss, delta=0.3),
    "ignore 3": entropy(ignore_index=3),
    "l1": regression(F.l1_loss),
    "mean": entropy(),
    "mse": regression(F.mse_loss),
    "mse of each": regression(F.mse_loss, reduction="none"),
    "own mean": own_mean,
    "several shifts": several_shifts,
    "shifted": shifted,
    "smooth l1": regression(F.smooth_l1_loss, beta=0.3),
    "smoothed": entropy(label_smoothing=0.1),
    "smoothed, weighted": entropy(label_smoothing=0.1, weight=WEIGHT),
    "soft": soft,
    "soft margin": regression(F.soft_margin_loss),
    "sum": entropy(reduction="sum"),
    "transformers' own": transformers_own,
    "weighted": entropy(weight=WEIGHT),
    "with z": with_z,
}


def batch_of(length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(V, (B, length), generator=draw) for _ in range(2))
    return {"input_ids": tokens, "labels": labels}


def check(loss, batch: dict[str, Tensor], ranks: int, limit: float = 1e-12, dims: dict | None = None) -> None:
    """The loss sharded, against eager; nothing falls back, and no hidden state or logit is gathered."""
    torch.manual_seed(0)
    compiled = equal_to_eager(Model(loss).double(), batch, ranks, limit, dims)
    assert not compiled.fallbacks
    assert gathers(compiled.program, batch["input_ids"].numel() * H) == []


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_equals_eager_s_and_gathers_nothing_wide(name, ranks):
    limit = 1e-6 if name == "transformers' own" else 1e-12
    check(LOSSES[name], batch_of(LONG), ranks, limit)


@pytest.mark.parametrize("name", ["shifted", "classes first", "own mean", "several shifts", "smoothed", "mse", "soft"])
def test_a_sequence_shorter_than_the_ranks(name):
    check(LOSSES[name], batch_of(5 if name == "several shifts" else SHORT), 6)


IGNORED = {
    "one rank's": lambda labels: labels[:, 4:9].fill_(-100),
    "all but one": lambda labels: labels.flatten()[1:].fill_(-100),
    "all": lambda labels: labels.fill_(-100),
    "a whole row and more": lambda labels: (labels[0].fill_(-100), labels[1, ::2].fill_(-100)),
}


@pytest.mark.parametrize("ignored", sorted(IGNORED))
@pytest.mark.parametrize("name", ["shifted", "classes first", "own mean", "smoothed", "sum", "weighted", "focal"])
def test_ignored_labels_wherever_they_are(name, ignored):
    batch = batch_of(LONG)
    IGNORED[ignored](batch["labels"])
    check(LOSSES[name], batch, 3)


def test_transformers_loss_of_a_counted_batch():
    batch = batch_of(LONG) | {"num_items_in_batch": torch.tensor(21)}
    check(transformers_own, batch, 3, 1e-6, {"input_ids": 1, "labels": 1})


@pytest.mark.parametrize("name", ["auxiliary", "classes first", "distilled", "huber", "mse", "own mean", "with z"])
def test_bf16_is_as_near_to_fp32_as_eager_bf16(name):
    torch.manual_seed(0)
    model, batch = Model(LOSSES[name]).bfloat16(), batch_of(LONG)
    reference = eager(copy.deepcopy(model).float(), batch)
    own = difference(reference, *floats(*eager(model, batch)))
    for result in sharded(model, batch, 3)[1]:
        gradients = {name.removeprefix("grad."): g for name, g in result.items() if name != "loss"}
        assert difference(reference, *floats(result["loss"], gradients)) <= 2 * own


def floats(loss: Tensor, gradients: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return loss.float(), {name: gradient.float() for name, gradient in gradients.items()}
