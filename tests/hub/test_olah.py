"""Pulling from a server that others wrote: olah (pip install olah), where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from hub.voice_maker import make_run

OLAH = os.environ.get("OLAH_CLI") or shutil.which("olah-cli")
CONFIG = """[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{folder}/repos"
mirrors-path = ["{folder}/mirrors"]
[accessibility]
offline = true
"""


@pytest.fixture
def olah(tmp_path, tiny_base):
    """Address of an olah that holds the voice me/voice."""
    if OLAH is None:
        pytest.skip("needs olah-cli in the path or in OLAH_CLI (pip install olah, best in an environment of its own)")
    voice = shutil.copytree(make_run(tmp_path, tiny_base) / "export", tmp_path / "mirrors" / "models" / "me" / "voice")
    (tmp_path / "repos").mkdir()
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "voice"]):
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@localhost", *command], cwd=voice, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "olah.toml").write_text(CONFIG.format(port=port, folder=tmp_path))
    server = subprocess.Popen([OLAH, "-c", str(tmp_path / "olah.toml")], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/")
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("disable_xet", ["0", "1"])
def test_a_voice_is_pulled_from_another_server(olah, repository, tmp_path, disable_xet):
    settings = {"HF_ENDPOINT": olah, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": disable_xet}
    done = subprocess.run(
        [sys.executable, str(repository / "scripts" / "pull.py"), "me/voice", str(tmp_path / "pulled")],
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name = "model.safetensors"
    assert (tmp_path / "pulled" / name).read_bytes() == (tmp_path / "run" / "export" / name).read_bytes()
