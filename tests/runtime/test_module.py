"""The module of an artifact for one rank, beside the model it was built from."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import autosp_aot
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.module import StepState
from examples import plain

SIZES = {"vocab_size": 8, "hidden_size": 4, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8, "dtype": "float64"}
ALONE = Group(0, 1, torch.device("cpu"))


class Biased(nn.Module):
    """With every kind of state: trained, frozen and unread parameters; buffers that are read, unread, and not kept."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 2)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.unread = nn.Parameter(torch.randn(3))
        self.register_buffer("kept", torch.randn(2))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("again", torch.randn(2), persistent=False)

    def forward(self, input_ids):
        return (self.table(input_ids) * self.frozen * self.kept + self.again).square().sum()


def built(model, batch, path):
    """The artifact's module for a single rank."""
    autosp_aot.build(model, batch, 1, path, target="cpu")
    return autosp_aot.load(path, comm=ALONE)


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(8, (2, 5), generator=generator) for name in ("input_ids", "labels")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("artifact") / "tied.sp1"
    autosp_aot.build(plain.build_model(**SIZES, tied=True), tokens(0), 1, path, target="cpu")
    return path


@pytest.fixture
def module(path):
    return autosp_aot.load(path, comm=ALONE)


@pytest.fixture
def model(module):
    model = plain.build_model(**SIZES, tied=True)
    model.load_state_dict(module.state_dict())
    return model


def assert_same_gradients(module, model):
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in module.named_parameters()}
    assert {name for name, grad in found.items() if grad is None} == {n for n, grad in expected.items() if grad is None}
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-15)


# --- state --------------------------------------------------------------------------------------------------------


def test_names_are_the_models_and_a_tied_weight_is_one_parameter(module, model):
    assert set(module.state_dict()) == set(model.state_dict())
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert module.get_parameter("head.weight") is module.get_parameter("tokens.weight")


class Named(nn.Module):
    """Its parts have the names of what a loaded module has besides."""

    def __init__(self):
        super().__init__()
        self.step_state, self.path = nn.Embedding(8, 2), nn.Parameter(torch.randn(2))

    def forward(self, input_ids):
        return (self.step_state(input_ids) * self.path).square().sum()


def test_parts_that_are_named_as_the_modules_own_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="error.name-taken.: parts of the model are called path, step_state\n"):
        built(Named(), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, tmp_path / "named")


def test_every_kind_of_state_is_kept_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = Biased()
    module = built(model, {"input_ids": tokens(0)["input_ids"]}, tmp_path / "a")
    assert set(module.state_dict()) == {"table.weight", "frozen", "unread", "kept", "steps"}
    assert {name for name, _ in module.named_buffers()} == {"kept", "steps"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_a_frozen_and_an_unread_parameter_have_no_gradient(tmp_path):
    torch.manual_seed(0)
    model, batch = Biased(), {"input_ids": tokens(0)["input_ids"]}
    module = built(model, batch, tmp_path / "a")
    for each in (module, model):
        each(**batch).backward()
    assert not module.get_parameter("frozen").requires_grad
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"table.weight"}
    torch.testing.assert_close(module.get_parameter("table.weight").grad, model.table.weight.grad)


# --- a step -------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_eagers(module, model):
    losses = [each(**tokens(1)) for each in (module, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert_same_gradients(module, model)


def test_steps_of_an_optimizer_are_eagers(module, model):
    losses = {}
    for each in (module, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        losses[each] = []
        for seed in range(3):
            optimizer.zero_grad()
            loss = each(**tokens(seed))
            loss.backward()
            optimizer.step()
            losses[each].append(loss.item())
    assert losses[module] == pytest.approx(losses[model], rel=1e-12)


def test_gradients_of_two_forwards_add_up(module, model):
    for each in (module, model):
        first, second = each(**tokens(1)), each(**tokens(2))
        second.backward()
        first.backward()
    assert_same_gradients(module, model)


class Summed(nn.Module):
    """Parameters with one gradient, in several shapes, some of it twice."""

    def __init__(self):
        super().__init__()
        self.table, self.flat = nn.Embedding(8, 12), nn.Parameter(torch.randn(12))
        self.square, self.again = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(12))
        self.front, self.back = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7))

    def forward(self, input_ids):
        offset = self.flat + self.square.flatten() + self.again + torch.cat([self.front, self.back])
        return (self.table(input_ids) + offset).square().mean()


def test_gradients_that_are_equal_add_up_apart(tmp_path):
    model, batch = Summed().double(), {"input_ids": tokens(0)["input_ids"]}
    module = built(model, batch, tmp_path / "summed.sp1")
    (2 * model(**batch)).backward()  # in one step: eager's own lie in each other and add up wrong
    for _ in range(2):
        module(**batch).backward()
    assert_same_gradients(module, model)


def test_a_scaled_loss_scales_the_gradients(module, model):
    for each in (module, model):
        (each(**tokens(1)) * 0.5).backward()
    assert_same_gradients(module, model)


def test_the_callers_autocast_changes_nothing(tmp_path):
    """In fp32: autocast leaves fp64 alone."""
    module = built(plain.build_model(**SIZES | {"dtype": "float32"}), tokens(0), tmp_path / "a")
    loss = module(**tokens(1))
    expected = torch.autograd.grad(loss, list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        again = module(**tokens(1))
        found = torch.autograd.grad(again, list(module.parameters()))
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_without_gradients_there_is_a_loss_all_the_same(module):
    with torch.no_grad():
        loss = module(**tokens(1))
    assert not loss.requires_grad and torch.equal(loss, module(**tokens(1)))


def test_parameters_loaded_after_the_build_are_those_of_the_next_step(module, model):
    with torch.no_grad():
        model.tokens.weight.add_(1)
    module.load_state_dict(model.state_dict())
    torch.testing.assert_close(module(**tokens(1)), model(**tokens(1)), rtol=1e-12, atol=0)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_second_backward_is_refused(module, retain_graph):
    loss = module(**tokens(1))
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="^backward was called twice on one loss"):
        loss.backward(retain_graph=retain_graph)


def test_a_parameter_changed_between_forward_and_backward_is_refused_as_eager_does(module, model):
    for each in (module, model):
        loss = each(**tokens(1))
        with torch.no_grad():
            each.get_parameter("blocks.0.out.weight").mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_gradient_of_a_gradient_is_refused(module):
    with pytest.raises(RuntimeError, match="the program holds one backward"):
        torch.autograd.grad(module(**tokens(1)), [module.get_parameter("head.weight")], create_graph=True)


class Dropping(nn.Module):
    """Half of an embedding's results are dropped."""

    def __init__(self):
        super().__init__()
        self.table, self.dropout = nn.Embedding(8, 64), nn.Dropout()

    def forward(self, input_ids):
        return self.dropout(self.table(input_ids)).square().mean()


def test_draws_follow_from_seed_and_step_and_a_forward_in_training_is_a_step(tmp_path):
    batch = {"input_ids": torch.arange(8).reshape(1, 8)}
    first, again = (built(Dropping(), batch, tmp_path / "artifact") for _ in range(2))
    again.load_state_dict(first.state_dict())
    losses = [first(**batch).item() for _ in range(3)]
    assert len(set(losses)) == 3 and first.step_state == StepState(0, 3)
    again.step_state = StepState(0, 1)
    assert [again(**batch).item() for _ in range(2)] == losses[1:]
    again.step_state = StepState(1)
    assert again(**batch).item() not in losses


def test_evaluate_gives_the_loss_of_eval_mode_in_either_mode_and_is_no_step(tmp_path):
    batch = {"input_ids": torch.arange(8).reshape(1, 8)}
    model = Dropping()
    module = built(model, batch, tmp_path / "artifact")
    wanted = model.eval()(**batch)
    trained = [module(**batch).item() for _ in range(2)]
    module.step_state = StepState()
    assert [module(**batch).item(), module.evaluate(**batch).item(), module(**batch).item()] == [
        trained[0], pytest.approx(wanted.item(), rel=1e-6), trained[1]
    ]  # fmt: skip
    found = module.eval()(**batch)
    assert found == module.evaluate(**batch) and not found.requires_grad and module.step_state.number == 2


def test_evaluate_reads_the_parameters_as_they_are_now(module, model):
    batch = tokens(1)
    module.evaluate(**batch)
    with torch.no_grad():
        for mine, theirs in zip(module.parameters(), model.parameters()):
            theirs.mul_(1.5)
            mine.copy_(theirs)
    torch.testing.assert_close(module.evaluate(**batch), model.eval()(**batch).detach(), rtol=1e-12, atol=0)


def test_evaluate_takes_a_batch_as_forward_does(module):
    with pytest.raises(ArtifactError, match="batch-mismatch"):
        module.evaluate(input_ids=torch.zeros(2, 6, dtype=torch.int32))


def test_an_artifact_without_an_evaluation_program_trains_and_refuses_to_evaluate(tmp_path):
    autosp_aot.build(plain.build_model(**SIZES), tokens(0), 1, tmp_path / "a", target="cpu", evaluation=False)
    module = autosp_aot.load(tmp_path / "a", comm=ALONE)
    module(**tokens(0)).backward()
    for evaluates in (module.evaluate, module.eval()):
        with pytest.raises(ArtifactError) as caught:
            evaluates(**tokens(0))
        assert str(caught.value) == (
            "error[no-evaluation]: the artifact has no evaluation program\n"
            "  where  evaluate\n"
            "  why    it was built with --no-evaluation\n"
            "  fix    build it without that option"
        )


def test_all_that_is_wrong_with_a_batch_is_said_at_once(module):
    with pytest.raises(ArtifactError) as caught:
        module(input_ids=torch.zeros(2, 6, dtype=torch.int32), mask=torch.zeros(2, 5))
    assert str(caught.value) == (
        "error[batch-mismatch]: the batch is not the one that was built for\n"
        "  where  forward\n"
        "  why    labels is missing\n"
        "         mask is not an input\n"
        "         input_ids is torch.int32 [2, 6], built for i64 [2, 5]\n"
        "  fix    give the whole batch on every rank, or build again for this shape"
    )


@pytest.mark.parametrize(("change", "said"), [
    (lambda x: x[:, :4], "labels is torch.int64 [2, 4], built for i64 [2, 5]"),
    (lambda x: x[:1], "labels is torch.int64 [1, 5], built for i64 [2, 5]"),
    (lambda x: x.float(), "labels is torch.float32 [2, 5], built for i64 [2, 5]"),
    (lambda x: x.to("meta"), "labels is on meta, the program runs on cpu"),
])  # fmt: skip
def test_a_batch_of_another_shape_dtype_or_device_is_refused(module, change, said):
    batch = tokens(1)
    with pytest.raises(ArtifactError) as caught:
        module(**batch | {"labels": change(batch["labels"])})
    assert f"  why    {said}\n" in str(caught.value)


def test_a_module_that_was_cast_says_what_it_was_built_for(module):
    module.bfloat16()
    with pytest.raises(ArtifactError) as caught:
        module(**tokens(0))
    assert str(caught.value).startswith(
        "error[state-mismatch]: the module's parameters are not those that its program was built for\n"
        "  where  forward\n"
        "  why    tokens.weight is torch.bfloat16 [8, 4] on cpu, built for f64 [8, 4] on cpu\n"
    )
    assert str(caught.value).endswith("leave the module as it was loaded; for another dtype, build a model of it")


def test_a_saved_state_starts_another_module(module, path, tmp_path):
    with torch.no_grad():
        module.get_parameter("tokens.weight").add_(1)
    state = module.state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "state.safetensors")
    again = autosp_aot.load(path, tmp_path / "state.safetensors", comm=ALONE)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())
