"""The peer as a fixture: builds or finds its environment and runs tasks of driver.py in it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from .environment import Unavailable, peer_environment

DRIVER = Path(__file__).parent / "driver.py"


class PeerRunner:
    """`run(task, ...)` hands a task to the peer and gives back its tensors and its answer."""

    def __init__(self, peer):
        self.peer = peer
        self.versions = {}

    def run(self, name, folder, inputs=None, transformers=None, **task):
        folder.mkdir(parents=True, exist_ok=True)
        version = transformers or self.peer.transformers
        (folder / "task.json").write_text(json.dumps(task))
        if inputs is not None:
            save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, folder / "inputs.safetensors")
        command = [str(self.peer.python), str(DRIVER), name, str(folder)]
        environment = self.peer.environment(version)
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"the peer failed at {name}:\n{done.stderr[-3000:]}"
        result = json.loads((folder / "answer.json").read_text())
        assert result["transformers"] == version
        return load_file(folder / "outputs.safetensors"), result["answer"]


@pytest.fixture(scope="session")
def peer():
    try:
        return PeerRunner(peer_environment())
    except Unavailable as reason:
        pytest.skip(f"tortoise-tts can't be installed here: {reason}")
