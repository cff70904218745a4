"""What is refused of a model file, its options and its batch: with a fix that builds."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build, build_file
from autosp_aot.errors import BuildError
from autosp_aot.export import model_file
from autosp_aot.export.model_file import STUBS, make_model, read_model_file
from tests.export.mend import BATCH, DIMS, Model, made

MODEL = """\
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, width), nn.Linear(width, 64)

    def forward(self, input_ids, labels):
        return nn.functional.cross_entropy(self.head(self.embedding(input_ids)).flatten(0, 1), labels.flatten())


def build_model(width=8):
    return Model(width)


def example_batch(batch_size, seq_len):
    tokens = torch.arange(batch_size * seq_len).view(batch_size, seq_len) % 64
    return {"input_ids": tokens, "labels": tokens}
"""
RETURN = '    return {"input_ids": tokens, "labels": tokens}\n'
RETURN_MODEL, MADE = "    return Model(width)", "    model = Model(width)\n"
STUB = STUBS["example_batch"]


@dataclass(frozen=True)
class FileMend:
    """Pieces of MODEL replaced so that it is refused at a line, and so that it is not, with options of build_model."""

    code: str
    fix: str
    refused: tuple[str, str] = ("", "")
    mended: tuple[str, str] = ("", "")
    options: Mapping[str, object] | None = None
    other_options: Mapping[str, object] | None = None
    large: bool = False


MENDS = [
    FileMend("model-file-incomplete", f"add\nimport torch\n{STUB}", (MODEL[MODEL.index("def example_batch"):], ""),
             (MODEL[MODEL.index("def example_batch"):], f"import torch\n{STUB}")),
    FileMend("model-file-failed", "correct it: python must be able to run the file",
             ("import torch\n", "import torch\nimport there_is_no_such_module\n")),
    FileMend("option-unknown", "correct the name, or add the argument to build_model", options={"widht": 4},
             other_options={"width": 4}),
    FileMend("option-unknown", "correct the name, or add the argument to build_model", options={"depth": 4},
             mended=("width=8", "width=8, depth=1"), other_options={"depth": 4}),
    FileMend("build-model-failed", "correct build_model or the options given with --set", options={"width": "wide"},
             other_options={"width": 4}),
    FileMend("not-a-module", "return the model", ("return Model(width)", "return Model")),
    FileMend("build-needs-weights", "leave that line out where weight.is_meta, as it is here",
             (RETURN_MODEL, f"{MADE}    print(float(model.head.weight.norm()))\n    return model"),
             (RETURN_MODEL, f"{MADE}    if not model.head.weight.is_meta:\n"
              "        print(float(model.head.weight.norm()))\n    return model"), large=True),
    FileMend("build-needs-weights", "compute it in forward",
             (RETURN_MODEL, f"{MADE}    model.register_buffer('norm', model.head.weight.detach().norm())\n"
              "    return model"), large=True),
    FileMend("batch-not-tensors", "return a dict of tensors, or of dicts of them; None, flags, numbers and texts are "
             "constants of the build", (RETURN, "    return [tokens, tokens]\n")),
    FileMend("batch-not-tensors", "return a dict of tensors, or of dicts of them; None, flags, numbers and texts are "
             "constants of the build", (RETURN, RETURN.replace("}", ', "more": [tokens]}'))),
    FileMend("batch-changes", "return the same names, dtypes and numbers of dims for every length",
             (RETURN, RETURN.replace('"labels"', "'labels' if seq_len < 8 else 'targets'"))),
    FileMend("batch-changes", "return the same names, dtypes and numbers of dims for every length",
             (RETURN, RETURN.replace("}", ', "long": seq_len > 8}'))),
    FileMend("example-batch-failed", "make it work for any batch size and length",
             (RETURN, "    assert seq_len < 8\n" + RETURN)),
    FileMend("no-sequence-dim", "use seq_len in example_batch",
             ("tokens = torch.arange(", "seq_len = 6\n    tokens = torch.arange(")),
    FileMend("sequence-dim-ambiguous", "give one sequence dim, and make the rest in forward",
             (RETURN, RETURN.replace("}", ', "mask": torch.ones(seq_len, seq_len)}'))),
]  # fmt: skip


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.code)
def test_the_fix_builds(mend, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(model_file, "WEIGHTS_LIMIT_BYTES", 0 if mend.large else 10**9)
    path = tmp_path / "model.py"
    path.write_text(replaced(mend.refused))
    with pytest.raises(BuildError) as caught:
        build_file(path, BuildConfig(2), 6, options=mend.options or {}, out=tmp_path / "refused")
    (problem,) = caught.value.problems
    assert (problem.code, problem.fix) == (mend.code, mend.fix)
    assert problem.where.startswith("model.py") and capfd.readouterr() == ("", "")
    path.write_text(replaced(mend.mended))
    assert build_file(path, BuildConfig(2), 6, options=mend.other_options or {}, out=tmp_path / "built").is_dir()
    assert not (tmp_path / "refused").exists()


def replaced(piece: tuple[str, str]) -> str:
    assert piece[0] in MODEL
    return MODEL.replace(*piece) if piece[0] else MODEL


def test_a_missing_file_is_one_that_is_given(tmp_path):
    with pytest.raises(BuildError) as caught:
        build_file(tmp_path / "model.py", BuildConfig(2), 6, out=tmp_path / "out")
    assert caught.value.problems[0].fix == "give the path of a Python file with build_model and example_batch"
    (tmp_path / "model.py").write_text(MODEL)
    assert build_file(tmp_path / "model.py", BuildConfig(2), 6, out=tmp_path / "out").is_dir()


@pytest.mark.parametrize("dims", [None, {"tokens": 0, "labels": 1}, {"inputs": 1}])
def test_sequence_dims_are_said(dims):
    batch = {"tokens": BATCH["tokens"], "labels": BATCH["labels"], "memory": torch.ones(2, 1, 16, dtype=torch.float64)}
    model = made(type("Adding", (Model,), {"inner": lambda self, x, labels, memory: x + memory}))
    with pytest.raises(BuildError) as caught:
        build(model, batch, 2, sequence_dims=dims, target="cpu")
    assert caught.value.problems[0].fix == 'say which it is: sequence_dims={"input_ids": 1, ...}'
    assert build(model, batch, 2, sequence_dims=DIMS, target="cpu")


COUNTING = """\
import itertools

import torch
from beside import LAYERS
from torch import nn

NUMBERS = itertools.count()
MADE = []


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.number, self.embedding, self.head = next(NUMBERS), nn.Embedding(64, 8), nn.Linear(8, 64)
        LAYERS.append(self.number)

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids) * (1 + self.number) * len(LAYERS)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def build_model():
    import later

    MADE.append(Model()) if not MADE else None
    return MADE[0].double() if later.TRUE else None


def example_batch(batch_size, seq_len):
    tokens = torch.arange(batch_size * seq_len).view(batch_size, seq_len) % 64
    return {"input_ids": tokens, "labels": tokens}
"""


def test_what_is_built_is_the_first_model_that_a_file_makes(tmp_path):
    for name, text in (("model.py", COUNTING), ("beside.py", "LAYERS = []\n"), ("later.py", "TRUE = True\n")):
        (tmp_path / name).write_text(text)
    made = make_model(read_model_file(tmp_path / "model.py"), {})
    assert made.number == 0 and not any(parameter.is_meta for parameter in made.parameters())
    assert sys.modules[type(made).__module__].LAYERS == [0]
    built = read_manifest(build_file(tmp_path / "model.py", BuildConfig(2), 4, 2, out=tmp_path / "out"))
    assert built.compared.startswith("2 steps of SGD")
