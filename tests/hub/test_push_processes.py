"""A run of two processes that pushes: one of them does, and both end."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import TOKEN
from faults.harness import run
from faults.kills import flags, train_script
from hub.voice_maker import CONSENT
from huggingface_hub import constants

from tortoise_hf.callbacks import hub as hub_callback


def train_and_note(argv: list[str], folder: str) -> None:
    """Call scripts/train.py and note which processes hand a push on."""
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]  # read when the client was imported, before the test began
    hub_callback.NICENESS = 0
    submit = hub_callback.Pusher.submit

    def noting(self, staging):
        Path(folder, f"pushed-by-{os.environ['RANK']}").touch()
        submit(self, staging)

    hub_callback.Pusher.submit = noting
    train_script(argv)


def test_one_of_two_processes_pushes(hub, tiny_base, tiny_voice, tmp_path):
    settings = {"training__max_steps": 4, "hub__repo_id": "me/voice", "hub__consent": CONSENT}
    settings |= {"hub__push": "checkpoint"}
    argv = flags(tiny_base, tiny_voice(8), tmp_path, tmp_path / "run", **settings)
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    run(tmp_path / "out", train_and_note, argv, str(tmp_path), num_processes=2, env=env)
    assert [path.name for path in tmp_path.glob("pushed-by-*")] == ["pushed-by-0"]
    first, second = ((tmp_path / "out" / f"out-{rank}.txt").read_text() for rank in (0, 1))
    assert "Pushed: " in first or "Already up to date" in first
    assert "ushed" not in second
    titles = hub.repository("me/voice").titles()
    assert titles[0] == "initial commit"
    assert len(titles) == len(set(titles)) >= 2
    weights = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert hub.repository("me/voice").files()["model.safetensors"] == weights
    assert not (tmp_path / "run" / ".hub").exists()
