"""Tiny runs in real processes that can be killed, cheap enough to start by the dozen.

A fork server imports torch and the package once; every process of a test is forked from it and costs milliseconds. Its
output goes into a file, its result into another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["faults.tiny"])
# Python 3.11 and older start the server without the path of the process that asks for it, and then it preloads nothing.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
TIMEOUT = 120.0


class Started:
    """Processes of one launch."""

    def __init__(self, folder: Path, processes: list) -> None:
        self.folder, self.processes = folder, processes

    def wait(self, timeout: float = TIMEOUT) -> list[int]:
        """Exit codes; what still runs after the time is killed and the test fails."""
        for process in self.processes:
            process.join(timeout)
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"{len(hanging)} processes hang: {self.output()}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"out-{rank}.txt").read_text()

    def results(self) -> list:
        codes = self.wait()
        assert codes == [0] * len(codes), "\n".join(self.output(rank) for rank in range(len(codes)))
        return [pickle.loads((self.folder / f"result-{rank}.pkl").read_bytes()) for rank in range(len(codes))]


def start(folder: Path, function, *args, num_processes: int = 1, env: dict[str, str] | None = None) -> Started:
    """Call `function(*args)` in new processes that see each other as ranks of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(env or {})}
        if num_processes > 1:
            settings |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            settings |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = CONTEXT.Process(target=_enter, args=(str(folder), rank, settings, function, args), daemon=False)
        process.start()
        processes.append(process)
    return Started(folder, processes)


def run(folder: Path, function, *args, num_processes: int = 1, env: dict[str, str] | None = None) -> list:
    """Results of all ranks."""
    return start(folder, function, *args, num_processes=num_processes, env=env).results()


def _enter(folder: str, rank: int, settings: dict[str, str], function, args: tuple) -> None:
    output = os.open(f"{folder}/out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(settings)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process started from a shell
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        result = function(*args)
        Path(folder, f"result-{rank}.pkl").write_bytes(pickle.dumps(result))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a rank must not wait at exit for one that is gone


def log_of(run_dir: Path) -> list[dict]:
    """The run's log without what depends on the machine's speed."""
    timing = {"clips_per_second", "tokens_per_second", "eta_seconds"}
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]
