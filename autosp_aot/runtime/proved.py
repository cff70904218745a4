"""An artifact is proved before it runs, once on a machine: verdicts are kept in the user's cache, never in an artifact.

    ~/.cache/autosp-aot/proved/<sha256 of: the artifact's digest, this package's source, torch's version>

An artifact's digest is the hash of its manifest, which has the hashes of all other files. What follows from the
artifact alone is proved. Other weights or buffers, and an edit made alike in the unsharded and in the sharded program,
are another artifact: who knows its digest from elsewhere demands it.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch

from autosp_aot.artifact.manifest import MANIFEST, Manifest, sha256_of
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.runtime.prove import prove_artifact


def digest_of(path: Path) -> str:
    """The digest of an artifact: 64 hexadecimal digits."""
    return sha256_of(path / MANIFEST)


def require_digest(path: Path, digest: str | None) -> str:
    """An artifact's digest. Raises ArtifactError (`artifact-digest`) where it is another than is demanded."""
    found = digest_of(path)
    if digest is not None and digest.lower() != found:
        raise ArtifactError(Problem(
            "artifact-digest", f"{path} is another artifact than was demanded", why=f"its digest is {found}",
            fix="autosp-aot check DIR --digest prints the digest of the artifact you mean",
        ))  # fmt: skip
    return found


def require_proof(path: Path, manifest: Manifest, digest: str) -> None:
    """Prove the artifact of this digest, unless this version has on this machine. Raises ArtifactError."""
    if not _is_known(digest):
        prove_artifact(path, manifest)
        remember(digest)


def remember(digest: str) -> None:
    """Keep that the artifact of this digest is proved; where there is no cache it is proved again."""
    verdict = _verdict(digest)
    if verdict is not None:
        try:
            verdict.parent.mkdir(parents=True, exist_ok=True)
            verdict.touch()
        except OSError:
            return


def _is_known(digest: str) -> bool:
    verdict = _verdict(digest)
    try:
        return verdict is not None and verdict.exists()
    except OSError:  # another user's folder
        return False


def _verdict(digest: str) -> Path | None:
    """The file that is there once the artifact is proved; None for a user without a home."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    key = hashlib.sha256(f"{digest} {_source()} {torch.__version__}".encode()).hexdigest()
    return home / ".cache" / "autosp-aot" / "proved" / key


@cache
def _source() -> str:
    """The hash of this package's code: what proves."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
