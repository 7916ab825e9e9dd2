"""The end of `make demo`, on a run that is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from hub.voice_maker import make_run


def demo(repository, run):
    return subprocess.run(
        [sys.executable, str(repository / "tests" / "demo_hub.py"), str(run)],
        capture_output=True,
        text=True,
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_demo_voice_goes_to_a_hub_and_comes_back(repository, tmp_path, tiny_base):
    run = make_run(tmp_path, tiny_base)
    for step in ("step-000000", "step-000005"):
        (run / "samples" / step).mkdir(parents=True)
        (run / "samples" / step / "1.wav").write_bytes(f"RIFF {step}".encode())
    entry = {"text": "Good morning.", "tuned": "step-000005/1.wav", "base": "step-000000/1.wav", "preview": True}
    (run / "samples" / "samples.json").write_text(json.dumps([entry]))
    done = demo(repository, run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all as the Hub recorded them" in done.stdout
    assert "The pulled weights equal the exported ones, and the card is valid." in done.stdout
    before, after, page = done.stdout.splitlines()[-3:]
    assert before.split() == ["before", str(run / "samples" / "step-000000" / "1.wav")]
    assert after.split() == ["after", str(run / "samples" / "step-000005" / "1.wav")]
    assert str(run / "samples" / "index.html") in page


def test_a_demo_without_sound_has_failed(repository, tmp_path, tiny_base):
    done = demo(repository, make_run(tmp_path, tiny_base))
    assert done.returncode == 1
    assert "error: the run spoke nothing" in done.stderr
