"""What a rank is about to run, in texts that ranks compare before they start (`runtime/agreement.py`).

Files are compared by what is in them, wherever they lie: up to a GiB all of it, beyond that evenly spaced blocks.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from autosp_aot.training.data import Feed, StoredBatch
from autosp_aot.training.loop import Training
from autosp_aot.training.token_source import RandomTokens

WHOLE_BYTES, BLOCK_BYTES = 2**30, 2**18
# Options that need not be the same on all ranks: places of one's own. The artifact and weights are compared themselves.
OWN = ("artifact", "digest", "init_from", "save", "metrics", "dump")


def facts_of(training: Training, feeds: Iterable[Feed]) -> dict[str, str]:
    """Artifact, options and data of a run, by the names that people know them by."""
    options = {name: value for name, value in asdict(training).items() if name not in OWN}
    rates = options.pop("schedule")
    options |= {"schedule": rates.pop("kind"), **rates}
    names = "--data or --batch-file", "--eval-data"
    return {
        "artifact": training.digest or "",
        **{f"--{name.replace('_', '-')}": json.dumps(value, sort_keys=True) for name, value in options.items()},
        **{name: _of_feed(feed) for name, feed in zip(names, feeds)},
    }


def _of_feed(feed: Feed) -> str:
    if isinstance(feed, StoredBatch):
        return _of_files((feed.path,))
    if isinstance(feed.source, RandomTokens):
        return "random tokens"
    return _of_files(feed.source.paths)


def _of_files(paths: tuple[Path, ...]) -> str:
    """Bytes, and the hash of what is in files, in their order."""
    found, total = hashlib.sha256(), sum(path.stat().st_size for path in paths)
    stride = max(1, -(-total // WHOLE_BYTES)) * BLOCK_BYTES
    for path in paths:
        size = path.stat().st_size
        found.update(f"{size} ".encode())
        with path.open("rb") as file:
            for at in range(0, size, stride):
                file.seek(at)
                found.update(file.read(BLOCK_BYTES))
    return f"{total} bytes, sha256 {found.hexdigest()[:16]}"
