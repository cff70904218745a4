"""The options of a build as people give them."""

import pytest

from autosp_aot.artifact.config import BuildConfig, checked_config
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import BuildError
from autosp_aot.targets.devices import DEVICES
from examples import plain


def refusal(**options) -> str:
    with pytest.raises(BuildError) as caught:
        checked_config(2, "cpu", **options)
    return str(caught.value)


def test_the_default_is_the_config_s():
    assert checked_config(2, "cpu") == BuildConfig(2)


def test_a_device_is_a_kind_with_rates():
    named, kind = checked_config(2, "h200"), checked_config(2, "cuda")
    assert (named.target, named.device) == ("cuda", DEVICES["h200"])
    assert (kind.target, kind.device) == ("cuda", None)
    with pytest.raises(BuildError, match="no-such-choice.*target is 'tpu'"):
        checked_config(2, "tpu")


def test_a_budget_alone_means_auto():
    config = checked_config(2, "cpu", memory_budget_bytes=100)
    assert (config.recompute, config.memory_budget_bytes) == ("auto", 100)


def test_a_budget_may_choose_what_is_offloaded_alone():
    config = checked_config(2, "cpu", "sac", 100, offload="auto")
    assert (config.recompute, config.offload) == ("sac", "auto")


@pytest.mark.parametrize("options", [{"recompute": "auto"}, {"offload": "auto"}])
def test_auto_needs_a_budget(options):
    assert refusal(**options).startswith("error[budget-missing]: ")


def test_a_budget_that_nothing_is_chosen_by_is_refused():
    assert refusal(recompute="sac", memory_budget_bytes=100) == (
        "error[budget-unused]: recompute sac and offload off, with a memory budget\n"
        "  why    with both of them said, nothing is left to choose\n"
        "  fix    leave one of them auto, or leave the budget out: autosp-aot plan says whether it fits"
    )


@pytest.mark.parametrize("options", [
    {"recompute": "some"}, {"offload": "disk"}, {"tile": 0}, {"tile": "many"}, {"tile": True}, {"tile": 1.5},
])  # fmt: skip
def test_what_is_no_choice_is_refused(options):
    assert refusal(**options).startswith("error[no-such-choice]: ")


def test_python_takes_sizes_as_text():
    model = plain.build_model(vocab_size=8, hidden_size=4, layers=1, heads=2, kv_heads=1, max_length=8)
    manifest = build(model, plain.example_batch(1, 4), 2, memory_budget="1MiB", tile=2, target="cpu").manifest
    assert (manifest.config.recompute, manifest.config.memory_budget_bytes, manifest.config.tile) == ("auto", 2**20, 2)
    config = build(model, plain.example_batch(1, 4), 2, memory_budget=1e6, target="cpu").manifest.config
    assert (type(config.memory_budget_bytes), config.memory_budget_bytes) == (int, 10**6)
