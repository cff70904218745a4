"""Damaged artifacts: they are refused with exit code 3, or compute what they did; no traceback, no hang.

    python ci/fuzz.py [--mutants 200] [--seed 0] [--keep DIR]

Four artifacts (plain; in tiles with values on the host; of three ranks without evaluation; one in bf16 that draws, with
a convolution, a bias and memory that kernels cannot read) are damaged in one place at a time: a byte, a line, a number
or word of a program, a value of a JSON file; sealed anew but for one in eight. Each is proved as before a run, in a
fork of this process, which has everything imported: thousands take minutes. One that would run is run, on all ranks:
its loss and gradients are those of the artifact it was made from, unless weights or buffers were changed, which no
proof is about. Then `check` takes or refuses it. What is accepted is counted by file.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.manifest import BUFFERS, MANIFEST, STEP, WEIGHTS, sealed, sha256_of
from autosp_aot.artifact.read import read_manifest, read_rank, read_tensors
from autosp_aot.commands.build.builder import compile_model, model_values
from autosp_aot.commands.check.proof import check
from autosp_aot.errors import AutospError
from autosp_aot.ir.operators import DTYPES
from autosp_aot.runtime.prove import prove_artifact
from autosp_aot.runtime.simulate import simulate
from examples import plain

SIZES = {"vocab_size": 8, "hidden_size": 8, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8}
CONFIGS = {
    "plain": BuildConfig(2),
    "tiles": BuildConfig(2, tile=2, offload="host"),
    "rows": BuildConfig(3, evaluation=False),
    "odd": BuildConfig(2),
}
SECONDS, BYTES = 60, 2**30  # of one mutant, above what this process has
VALUES = (None, True, -1, 0, 1, 2**60, 2**70, 0.5, float("nan"), "", "x", [], [[]], {}, {"x": 1})
NUMBERS = ("0", "1", "-1", "2", "7", "1.5", "nan", "inf", str(2**60), str(2**70), "$0", "%x", '"x"', "[]", "None", "")
OUTCOMES = {0: "accepted", 3: "refused", 1: "traceback", 4: "other numbers", 5: "ended by the system"}
Numbers = list[dict[str, torch.Tensor]]


class Odd(nn.Module):
    """What the plain model has not."""

    def __init__(self):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(8, 8), nn.Conv1d(8, 24, 3, padding=1)
        self.bias, self.drop, self.head = nn.Parameter(torch.randn(2, 1, 6)), nn.Dropout(0.3), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        q, k, v = self.mix(x.transpose(1, 2)).unflatten(1, (3, 2, 4)).transpose(3, 4).unbind(1)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = plain + F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, dropout_p=0.1 * self.training)
        logits = self.head(x + self.drop(out.transpose(1, 2).flatten(2)))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where mutants that end otherwise are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, outcomes, accepted, wrong = random.Random(options.seed), Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # where verdicts are kept
        artifacts = [built(name, Path(folder, name)) for name in CONFIGS]
        expected = [numbers(path) for path in artifacts]
        for number in range(options.mutants):
            mutant = Path(folder, "mutant")
            shutil.rmtree(mutant, ignore_errors=True)
            shutil.copytree(artifacts[number % len(artifacts)], mutant)
            said, name = damage(mutant, rng)
            values = name in (BUFFERS, WEIGHTS)
            code, text = outcome_of(mutant, None if values else expected[number % len(artifacts)])
            outcomes[OUTCOMES[code]] += 1
            accepted[name] += code == 0
            if code not in (0, 3):
                wrong += 1
                print(f"mutant {number} of {artifacts[number % len(artifacts)].name}, {said}: {OUTCOMES[code]}\n{text}")
                if options.keep is not None:
                    shutil.copytree(mutant, options.keep / str(number))
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    print("accepted by file: " + ", ".join(f"{name} {count}" for name, count in sorted(accepted.items()) if count))
    return 1 if wrong else 0


def built(name: str, path: Path) -> Path:
    """One of the artifacts, with weights."""
    torch.manual_seed(0)
    model = Odd().bfloat16() if name == "odd" else plain.build_model(**SIZES, dtype="float64")
    config = CONFIGS[name]
    artifact = compile_model(model, plain.example_batch(2, 6), {"input_ids": 1, "labels": 1}, config, "")
    stored = {spec.name for spec in artifact.manifest.parameters}
    weights = {key: value for key, value in model_values(model).items() if key in stored}
    return replace(artifact, weights=weights).save(path)


def damage(path: Path, rng: random.Random) -> tuple[str, str]:
    """Change one place of an artifact, and mostly seal it; what was changed, and in which file."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "report.html")
    file = rng.choice(files)
    name = file.relative_to(path).as_posix()
    seal = rng.random() < 7 / 8
    if file.name == MANIFEST and seal:
        manifest = json.loads(file.read_text())["manifest"]
        what = of_json(manifest, rng)
        file.write_text(sealed(manifest))
        return f"{name}: {what}", name
    if file.suffix == ".json" and rng.random() < 0.8:
        content = json.loads(file.read_text())
        what = of_json(content, rng)
        file.write_text(json.dumps(content))
    elif file.suffix == ".program" and rng.random() < 0.9:
        what = of_program(file, rng)
    else:
        data = bytearray(file.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        what = f"a bit of byte {at}"
    if seal and file.name != MANIFEST:
        manifest = json.loads((path / MANIFEST).read_text())["manifest"]
        manifest["files"][name] = sha256_of(file)
        (path / MANIFEST).write_text(sealed(manifest))
    return f"{name}: {what}{'' if seal else ', not sealed'}", name


def of_json(content, rng: random.Random) -> str:
    """Change one value of a JSON file, at any depth."""
    places = [(content, key) for key in keys(content)]
    depth = rng.randrange(5)
    for _ in range(depth):
        inner = [(holder[key], k) for holder, key in places for k in keys(holder[key])]
        places = inner or places
    holder, key = rng.choice(places)
    if rng.random() < 0.15:
        del holder[key]
        return f"{key!r} is left out"
    holder[key] = rng.choice(VALUES)
    return f"{key!r} is {holder[key]!r}"


def keys(content) -> list:
    if isinstance(content, dict):
        return list(content)
    return list(range(len(content))) if isinstance(content, list) else []


def of_program(file: Path, rng: random.Random) -> str:
    """Change a line, or a word or number of one."""
    lines = file.read_text().splitlines()
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(6)
    before = lines[at]
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, before)
    elif kind == 2:
        lines[at], lines[other] = lines[other], before
    else:
        words = [word for word in re.split(r"[\s()\[\],]+", before) if word]
        word = rng.choice(words or [before])
        lines[at] = before.replace(word, rng.choice((*NUMBERS, *lines[other].split())) if kind < 5 else "", 1)
    file.write_text("\n".join(lines) + "\n")
    return f"line {at + 1}, {before.strip()[:60]!r}, change {kind} ({lines[min(at, len(lines) - 1)].strip()[:60]!r})"


def numbers(path: Path) -> Numbers:
    """Loss and gradients of all ranks with the stored weights on a fixed batch, and the loss in eval mode."""
    manifest, values = read_manifest(path), {}
    for name in (BUFFERS, WEIGHTS):
        values |= read_tensors(path, manifest, name)
    draw = torch.Generator().manual_seed(0)
    values |= {spec.name: torch.randint(8, spec.shape, generator=draw) for spec in manifest.batch}
    found = []
    values["seed"] = torch.tensor(1)
    for kind in manifest.programs:
        programs = [read_rank(path, manifest, rank, kind) for rank in range(manifest.ranks)]
        loss = programs[0].values()[dict(programs[0].sections[0].gives)["loss"]]
        found += simulate(programs, values, torch.tensor(0.75 if kind == STEP else 1.0, dtype=DTYPES[loss.dtype]))
    return found


def outcome_of(path: Path, expected: Numbers | None) -> tuple[int, str]:
    """What proof, step and `check` make of an artifact, in a fork with limits, as one of OUTCOMES; what it printed."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        code, text = in_child(path, expected)
        with contextlib.suppress(BrokenPipeError):
            os.write(into, text.encode()[-4000:])
        os._exit(code)
    os.close(into)
    ended = time.monotonic() + SECONDS
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if not os.WIFEXITED(status) or time.monotonic() > ended:
        return 5, f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "too slow"
    return os.WEXITSTATUS(status), text


def in_child(path: Path, expected: Numbers | None) -> tuple[int, str]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                prove_artifact(path, read_manifest(path))
                if expected is not None and not alike(numbers(path), expected):
                    return 4, ""
                check(path)
            except AutospError as error:
                return 3 if error.exit_code == 3 else 1, str(error)
        return 0, ""
    except BaseException:  # whatever it is, it is what a user would have seen
        return 1, traceback.format_exc()


def alike(found: Numbers, expected: Numbers) -> bool:
    """Equal bits: nothing that is accepted computes in another order."""
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(torch.equal(a[label], b[label]) for label in a) for a, b in zip(found, expected)
    )


if __name__ == "__main__":
    sys.exit(main())
