"""Ranks as real processes over gloo: seconds each, so few."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(size: int, script: Path, *args: object, timeout_s: int = 300) -> list[subprocess.CompletedProcess]:
    """What each of `size` ranks of a Python script printed, as torchrun would start them; raises where one fails."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    shared = {
        "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(),
        "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT,
    }  # fmt: skip
    command = [sys.executable, str(script), *map(str, args)]
    ranks = []
    for rank in range(size):
        said = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=os.environ | said, cwd=ROOT, **pipes))
    done = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=timeout_s)
            done.append(subprocess.CompletedProcess(command, rank.returncode, out, err))
    finally:
        for rank in ranks:
            rank.kill()
    for rank, result in enumerate(done):
        assert result.returncode == 0, f"rank {rank}: {result.stderr}"
    return done


def run_agents(*lines: tuple, timeout_s: int = 120) -> list[subprocess.CompletedProcess]:
    """What torchrun says on each of several nodes, of one rank each: `autosp-aot run` with a line of arguments each."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    shared = {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    port, agents = _free_port(), []
    for node, arguments in enumerate(lines):
        said = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", len(lines), "--node-rank", node,
            "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port, "-m", "autosp_aot", "run",
            *arguments,
        ]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        agents.append(subprocess.Popen(list(map(str, said)), env=os.environ | shared, cwd=ROOT, **pipes))
    try:
        outputs = [agent.communicate(timeout=timeout_s) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [subprocess.CompletedProcess(a.args, a.returncode, *output) for a, output in zip(agents, outputs)]


def command(*args: object, timeout_s: int = 300) -> subprocess.CompletedProcess:
    """What `autosp-aot` does with these arguments in a process of its own."""
    said = [sys.executable, "-c", "from autosp_aot.commands.cli import main; main()", *map(str, args)]
    return subprocess.run(said, capture_output=True, text=True, timeout=timeout_s)


def json_lines(result: subprocess.CompletedProcess) -> list[dict]:
    """The lines of a rank's output that are JSON objects."""
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
