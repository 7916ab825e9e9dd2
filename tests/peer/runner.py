"""Hands tasks of driver.py to the peer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from safetensors.torch import load_file, save_file

from .environment import Peer

DRIVER = Path(__file__).parent / "driver.py"


class PeerRunner:
    """`run(task, ...)` hands a task to the peer, in a process of its own, and gives back its tensors and its answer."""

    def __init__(self, peer: Peer, threads: int = 2, timeout: float = 600):
        self.peer, self.threads, self.timeout = peer, threads, timeout

    def run(self, name, folder, inputs=None, transformers=None, **task):
        folder.mkdir(parents=True, exist_ok=True)
        version = transformers or self.peer.transformers
        (folder / "task.json").write_text(json.dumps(task))
        if inputs is not None:
            save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, folder / "inputs.safetensors")
        command = [str(self.peer.python), str(DRIVER), name, str(folder)]
        environment = self.peer.environment(version, self.threads)
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=self.timeout, check=False
        )
        assert done.returncode == 0, f"the peer failed at {name}:\n{done.stderr[-3000:]}"
        result = json.loads((folder / "answer.json").read_text())
        assert result["transformers"] == version
        return load_file(folder / "outputs.safetensors"), result["answer"]
