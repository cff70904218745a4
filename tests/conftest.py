import gc
import os
import tempfile
from dataclasses import replace

import pytest
import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from examples import plain

torch.set_num_threads(1)  # in tensors as small as these, threads would do nothing but wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # so in processes that tests start

TINY = {"vocab_size": 8, "hidden_size": 8, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8}


def pytest_configure(config):
    """What is kept for the user, such as verdicts of proofs, is kept elsewhere: nothing is known before."""
    home = tempfile.TemporaryDirectory(prefix="autosp-aot-home-")
    config.add_cleanup(home.cleanup)
    os.environ["HOME"] = home.name


def pytest_collection_finish():
    """What modules hold stays: no search for garbage looks at it, which is a fifth of the time of a capture."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny():
    """An artifact in memory: a layer, 2 heads, 1 key/value head, 2 rows of 5 tokens, for 3 ranks (one: half a head)."""
    torch.manual_seed(0)
    model = plain.build_model(**TINY, dtype="float64")
    return compile_model(model, plain.example_batch(2, 5), {"input_ids": 1, "labels": 1}, BuildConfig(3), "")


@pytest.fixture(scope="session")
def tiny2():
    """The same for 2 ranks: a head each."""
    torch.manual_seed(0)
    model = plain.build_model(**TINY, dtype="float64")
    return compile_model(model, plain.example_batch(2, 5), {"input_ids": 1, "labels": 1}, BuildConfig(2), "")


@pytest.fixture(scope="session")
def full(tiny2):
    """`tiny2` with weights and a buffer."""
    weights = {spec.name: torch.ones(spec.shape, dtype=torch.float64) for spec in tiny2.manifest.parameters}
    return replace(tiny2, weights=weights, buffers={"b": torch.arange(3)})


@pytest.fixture
def saved(full, tmp_path):
    return full.save(tmp_path / "a")
