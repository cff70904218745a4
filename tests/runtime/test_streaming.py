"""Weights are read and written a tensor at a time: the model is in memory once.

A process of its own may take 1.2 times the parameters more than it has before it loads, and map one file. The limit is
the kernel's, on private memory; torch maps files so that they count in full, though their pages are the page cache's.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build_file
from autosp_aot.ir.program import Value

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
ALLOWED = 1.2
LOADS = """
import re, resource, sys
from pathlib import Path
import torch
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.load import load
from autosp_aot.runtime.weights_out import save_weights

artifact, folder, out, allowed = sys.argv[1:]
data = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + int(allowed), data + int(allowed)))
module = load(artifact, folder, comm=Group(0, 1, torch.device("cpu")))
save_weights(Path(artifact), module.manifest, module.state_dict(), Path(out))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    options = {"vocab_size": 4096, "hidden_size": 2048, "layers": 2, "heads": 4, "kv_heads": 4, "dtype": "bfloat16"}
    out = tmp_path_factory.mktemp("artifact") / "a"
    return build_file(EXAMPLES / "plain.py", BuildConfig(1), 16, 1, options, out, weights=False, eager_check=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_and_saving_takes_the_model_once(path, tmp_path, dtype):
    specs = read_manifest(path).parameters
    size = sum(Value(spec.name, spec.dtype, spec.shape).nbytes() for spec in specs)
    assert size > 200 * 2**20
    for at, spec in enumerate(specs):
        tensor = torch.full(spec.shape, at, dtype=dtype)
        save_file({spec.name: tensor}, tmp_path / f"{at}.safetensors")
    file = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    arguments = [path, tmp_path, tmp_path / "out", str(int(size * ALLOWED) + file)]
    subprocess.run([sys.executable, "-c", LOADS, *arguments], check=True)
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) >= size
