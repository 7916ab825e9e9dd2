"""The end of `make demo`, on a run that is at hand."""

from __future__ import annotations

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
    done = demo(repository, run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all as the Hub recorded them" in done.stdout
    assert "The pulled weights equal the exported ones, and the card is valid." in done.stdout
