"""The benchmark for devices runs here too: every kernel within its limit, and the layers of both."""

import re
import subprocess
import sys
from pathlib import Path

from autosp_aot.ops.table import ALL

ROOT = Path(__file__).parent.parent


def test_it_calls_every_operator_of_our_own_and_finds_nothing_beyond_its_limit():
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    called = set(re.findall(r"^\| (\w+), (?:float32|bfloat16|float16) \|", done.stdout, re.MULTILINE))
    assert {f"autosp.{name}" for name in called} == {op.name for op in ALL}
    assert len(re.findall(r"^\| 256 tokens, (?:sp 1|rank 0 of sp 8) \|", done.stdout, re.MULTILINE)) == 2
    assert not (ROOT / "docs" / "gpu.md").exists() or "CPU" not in (ROOT / "docs" / "gpu.md").read_text()
