"""What a batch may hold beside tensors: dicts of them, and None, flags, numbers and texts, constants of the build."""

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from autosp_aot.artifact.batches import flat, nested
from autosp_aot.commands.build.builder import build
from autosp_aot.commands.cli import main
from autosp_aot.errors import ArtifactError, BuildError
from autosp_aot.runtime.load import load
from tests.eager import difference

V, H, S = 32, 8, 5


class Model(nn.Module):
    """Every constant changes what it computes."""

    def __init__(self):
        super().__init__()
        self.tokens, self.pixels, self.head = nn.Embedding(V, H), nn.Linear(3, H), nn.Linear(H, V)

    def forward(self, ids, labels, image, mask=None, double=False, kind="mean", scale=1.0):
        x = self.tokens(ids) + self.pixels(image["pixels"]).mean(1, keepdim=True) * image["size"]["height"]
        x = x if mask is None else x * mask[..., None]
        x = x * scale * (2 if double else 1)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction=kind)


def batch(**changes) -> dict:
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(V, (2, S), generator=draw) for _ in range(2))
    image = {"pixels": torch.rand(2, 4, 3, dtype=torch.float64, generator=draw), "size": {"height": 3, "name": None}}
    constants = {"mask": None, "double": True, "kind": "sum", "scale": 0.5}
    return {"ids": ids, "labels": labels, "image": image, **constants, **changes}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


DIMS = {"ids": 1, "labels": 1}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_with_constants_is_eager_s(ranks):
    artifact = build(model(), batch(), ranks, sequence_dims=DIMS, target="cpu")
    assert artifact.manifest.compared.startswith("2 steps of SGD")
    assert artifact.manifest.constants == {
        "image.size.height": 3, "image.size.name": None, "mask": None, "double": True, "kind": "sum", "scale": 0.5,
    }  # fmt: skip


class Ordered(Model):
    """Computes in the order of its inputs."""

    def forward(self, ids, labels, **more):
        x = self.tokens(ids)
        for value in more.values():
            x = x.tanh() * value if isinstance(value, float) else x + value
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_constants_stay_in_their_place_among_tensors():
    torch.manual_seed(0)
    given = batch(half=0.5)
    given = {"ids": given["ids"], "labels": given["labels"], "shift": torch.ones(H, dtype=torch.float64), "half": 0.5}
    artifact = build(Ordered().double(), given, 2, sequence_dims=DIMS, target="cpu")
    assert artifact.manifest.compared.startswith("2 steps of SGD")


class Feats(dict):
    """A dict that does more than a dict."""


@pytest.mark.parametrize(("value", "what"), [
    ({}, "'image' is an empty dict, where None would be a constant"), (Feats(size=1), "'image' is Feats"),
])  # fmt: skip
def test_a_dict_that_forward_would_not_get_as_it_is_given_is_refused(value, what):
    with pytest.raises(BuildError, match=what):
        build(model(), batch(image=value), 2, sequence_dims=DIMS, target="cpu")


def test_what_is_no_batch_and_no_number_of_ranks_is_refused():
    with pytest.raises(BuildError, match="batch-not-tensors.*the batch is tuple"):
        build(model(), tuple(batch().values()), 2, target="cpu")
    with pytest.raises(BuildError, match="no-such-choice.*sp is 0"):
        build(model(), batch(), 0, target="cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("constants") / "a"
    build(model(), batch(), 1, path, sequence_dims=DIMS, target="cpu")
    return path


def test_a_loaded_module_takes_the_batch_as_the_model_does(path):
    sharded, eager = load(path), model()
    loss, wanted = sharded(**batch()), eager(**batch())
    loss.backward()
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    reference = wanted.detach(), {name: parameter.grad for name, parameter in eager.named_parameters()}
    assert difference(reference, loss.detach(), gradients) <= 1e-12
    assert torch.allclose(sharded.evaluate(**batch()), wanted)
    tensors = {name: value for name, value in flat(batch()).items() if isinstance(value, torch.Tensor)}
    assert torch.equal(sharded(**tensors), loss)


@pytest.mark.parametrize(("changes", "what"), [
    ({"double": False}, "double is False, built for True"),
    ({"mask": torch.ones(2, S)}, "mask is not an input"),
    ({"more": 7}, "more is 7, not an input"),
    ({"ids": [1, 2]}, "'ids' is list"),
])  # fmt: skip
def test_another_constant_than_the_build_s_is_refused(path, changes, what):
    with pytest.raises(ArtifactError) as caught:
        load(path)(**batch(**changes))
    assert str(caught.value).startswith("error[batch-mismatch]: the batch is not the one that was built for\n")
    assert what in str(caught.value)


def test_a_batch_from_a_file_has_the_tensors_by_their_flat_names(path, tmp_path):
    tensors = {name: value for name, value in flat(batch()).items() if isinstance(value, torch.Tensor)}
    save_file(tensors, tmp_path / "batch.safetensors")
    arguments = ["run", path, "--steps", "1", "--batch-file", tmp_path / "batch.safetensors"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0 and f"loss {float(model()(**batch())):.4f}"[:10] in result.stdout


def test_flat_and_nested_are_each_other_s_inverse():
    given = {"a": 1, "b": {"c": None, "d": {"e": torch.ones(1)}}, "f": "text"}
    assert list(flat(given)) == ["a", "b.c", "b.d.e", "f"]
    assert nested(flat(given)) == given


@pytest.mark.parametrize(("given", "what"), [
    ({"a": [torch.ones(1)]}, "in the batch, 'a' is list"),
    ({"a": {"b": (1, 2)}}, "in the batch, of 'a', 'b' is tuple"),
    ({"a.b": torch.ones(1)}, "in the batch, the name 'a.b' is no text without dots"),
    ({3: torch.ones(1)}, "in the batch, the name 3 is no text without dots"),
    ({"a": torch.float32}, "in the batch, 'a' is dtype"),
])  # fmt: skip
def test_what_cannot_be_part_of_a_batch_is_refused_by_name(given, what):
    with pytest.raises(BuildError) as caught:
        build(model(), batch() | given, 2, sequence_dims=DIMS, target="cpu")
    assert str(caught.value).startswith(f"error[batch-not-tensors]: {what}\n  where  batch\n")
