"""One process a rank: torch's elastic launcher on this machine, or the ranks that torchrun already started.

    run  ->  check what can be checked, once  ->  elastic_launch  ->  rank 0   join, load, train
                                                                     rank 1   an AutospError comes back in a file
"""

import json
import logging
import os
import signal
import socket
import tempfile
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from autosp_aot.artifact.atomic_folder import refuse_unwritable
from autosp_aot.artifact.manifest import Manifest, no_evaluation
from autosp_aot.artifact.read import read_manifest
from autosp_aot.errors import ArtifactError, AutospError, Problem, need_package
from autosp_aot.runtime.comm import Mesh, check_devices, check_size
from autosp_aot.runtime.proved import require_digest, require_proof
from autosp_aot.runtime.weights_out import refuse_saving
from autosp_aot.targets.table import CPU
from autosp_aot.training.data import Feed, StoredBatch, open_feed
from autosp_aot.training.deepspeed.config import checked_config, read_config
from autosp_aot.training.label_count import is_items, open_items
from autosp_aot.training.loop import Training, train
from autosp_aot.training.loss_targets import check_targets, shifted_inputs
from autosp_aot.training.same_run import facts_of

STORED = ".safetensors"
INTERRUPTED = 128  # a shell's exit code for a process that signal n ended is 128 + n


class RankFailed(AutospError):
    """A rank's process ended in a way that is not the user's doing (exit code 1)."""

    exit_code = 1


def run(
    training: Training,
    data: Path | None,
    batch_file: Path | None,
    eval_data: Path | None = None,
    deepspeed: Path | None = None,
) -> None:
    """Train with an artifact, on as many replicas of its ranks as `training` says; `deepspeed` is a config file.

    Raises ArtifactError for whatever does not fit (artifact, machine, weights, data), RankFailed where a process dies.
    """
    with Mesh.told():
        training, manifest, feeds = _prepared(training, data, batch_file, eval_data, deepspeed)
    if "WORLD_SIZE" in os.environ or manifest.ranks * training.dp == 1:
        _join_and_train(training, manifest.target, manifest.ranks, feeds)
    else:
        _launch(training, manifest, feeds)


def _prepared(
    training: Training, data: Path | None, batch_file: Path | None, eval_data: Path | None, deepspeed: Path | None
) -> tuple[Training, Manifest, list[Feed]]:
    """All that can be refused before ranks meet; what they run, and on what."""
    folders = {"--data": data, "--init-from": training.init_from, "--eval-data": eval_data}
    files = {"--batch-file": batch_file, "--deepspeed": deepspeed}
    for option, path in (folders | files).items():
        if path is not None and not (path.is_file() if option in files else path.exists()):
            raise AutospError(Problem("no-such-file", f"{option} {path}: there is no such file"))
    manifest = read_manifest(training.artifact)
    digest = require_digest(training.artifact, training.digest)
    require_proof(training.artifact, manifest, digest)
    training = replace(training, digest=digest)
    if deepspeed is not None:
        need_package("deepspeed", "--deepspeed")
        config = checked_config(read_config(deepspeed), manifest, training.dp)
        config["managed_gradient_accumulation"] = True  # whose loop it is that counts: not the user's here
        training = replace(training, deepspeed=config, accumulate=config["gradient_accumulation_steps"])
    _check(manifest, training)
    shifted: frozenset[str] = frozenset()
    if data is not None or eval_data is not None and eval_data.suffix != STORED:
        shifted = shifted_inputs(training.artifact, manifest)
    inputs = tuple(entry for entry in manifest.batch if not is_items(entry))
    feeds = [open_feed(inputs, training.seed, data, batch_file, training.dp * training.accumulate, shifted)]
    if eval_data is not None:
        stored = eval_data.suffix == STORED
        tokens, batches = (None, eval_data) if stored else (eval_data, None)
        feeds.append(open_feed(inputs, training.seed, tokens, batches, training.eval_batches, shifted))
    for feed in feeds:
        if isinstance(feed, StoredBatch):
            check_targets(training.artifact, manifest, feed.batches(), feed.path)
    if shifted and os.environ.get("RANK", "0") == "0":
        names = ", ".join(sorted(shifted))
        print(f"{names}: the next tokens, since the loss compares position with position", flush=True)
    return training, manifest, feeds


def _check(manifest: Manifest, training: Training) -> None:
    """What would fail on every rank alike fails here, before a process is started (`load` checks the rest)."""
    if "WORLD_SIZE" in os.environ:
        check_size(int(os.environ["WORLD_SIZE"]), manifest.ranks, training.dp)
    else:
        check_devices(manifest.target, manifest.ranks * training.dp)
    for option, path in (("--metrics", training.metrics), ("--dump", training.dump)):
        if path is not None and not path.absolute().parent.is_dir():
            raise AutospError(Problem("no-such-folder", f"{option} {path}: the folder does not exist"))
        if path is not None and training.artifact.resolve() in path.resolve().parents:
            raise AutospError(Problem("output-inside", f"{option} {path}: it is in the artifact",
                                      why="an artifact holds what its manifest lists and nothing else"))  # fmt: skip
    if training.dump is not None and training.dump.exists() and not training.dump.is_file():
        raise AutospError(Problem("output-unwritable", f"--dump {training.dump}: it is no file that could be replaced"))
    if training.save is not None:
        refuse_saving(training.artifact, manifest, training.save)
        if os.environ.get("RANK", "0") == "0":  # the rank that writes
            refuse_unwritable(training.save)
    if training.eval_every is not None and manifest.evaluation is None:
        raise ArtifactError(no_evaluation("--eval-every"))
    narrow = [entry.name for entry in manifest.parameters if entry.dtype == "f16" and entry.name in manifest.trainable]
    if narrow and training.dump is None and training.deepspeed is None:
        raise ArtifactError(Problem(
            "no-loss-scaling", f"{len(narrow)} parameters are in fp16, {narrow[0]} among them",
            why="gradients below fp16's smallest number would be lost: they need a loss that is scaled to avoid it",
            fix="build the model in bf16, or give --deepspeed a config with fp16, which scales the loss",
        ))  # fmt: skip
    open_items(training.artifact, manifest)


def _join_and_train(training: Training, target: str, ranks: int, feeds: list[Feed]) -> None:
    facts = facts_of(training, feeds) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    mesh = Mesh.join(target, ranks, training.dp, training.deepspeed is None, facts)
    feed, *held_out = feeds
    try:
        train(training, feed, mesh, *held_out)
    except AutospError:
        mesh.leave(wait=False)
        raise
    mesh.leave()


def _launch(training: Training, manifest: Manifest, feeds: list[Feed]) -> None:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=manifest.ranks * training.dp, run_id=uuid.uuid4().hex, role="rank",
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
        max_restarts=0, monitor_interval=0.05, shutdown_timeout=5,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="autosp-aot-") as folder:
        logging.disable(logging.ERROR)  # the launcher repeats what we report
        try:
            elastic_launch(config, _worker)(training, manifest.target, manifest.ranks, feeds, folder)
        except ChildFailedError as error:
            raise _reported(Path(folder)) or _failed(error) from None
        except SignalException as stopped:
            raise SystemExit(INTERRUPTED + stopped.sigval) from None
        finally:
            logging.disable(logging.NOTSET)


def _worker(training: Training, target: str, ranks: int, feeds: list[Feed], folder: str) -> None:
    """The process of one rank; leaves an AutospError in `folder`, for the parent to raise, and fails."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank at once; the parent says what there is to say
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    if target == CPU.name:
        os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    try:
        _join_and_train(training, target, ranks, feeds)
    except AutospError as error:
        problems = json.dumps([asdict(problem) for problem in error.problems])
        Path(folder, f"{rank:06}.json").write_text(problems)
        raise SystemExit(error.exit_code) from None


def _reported(folder: Path) -> ArtifactError | None:
    """The error that the lowest rank left; what stops a rank once everything is built is always the artifact's fit."""
    reports = sorted(folder.glob("*.json"))
    return ArtifactError(*(Problem(**problem) for problem in json.loads(reports[0].read_text()))) if reports else None


def _failed(error: ChildFailedError) -> RankFailed:
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = message["extraInfo"]["py_callstack"]
    what = f"rank {rank} ended with exit code {failure.exitcode}"
    return RankFailed(Problem("rank-failed", what, why=message.strip()))
