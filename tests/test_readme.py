"""The README's commands do what it says: each is run as written, on tiny data put behind it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from scripts.test_train import tiny_run

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("   #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
BY_MAKE = {"make demo", "make test", "python3 -m venv .venv && . .venv/bin/activate"}
INSTALL = "pip install -c constraints.txt -e ."


def run(command: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess:
    """The command in a shell of its own, with this Python's programs first, as in an activated environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    if "--num_processes" in command:
        env["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        f"{command} {shlex.join(flags)}", shell=True, capture_output=True, text=True, cwd=folder, env=env
    )


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 10
    assert BY_MAKE | {INSTALL} <= set(COMMANDS)


def test_make_installs_as_the_readme_does():
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "pip install --quiet -c constraints.txt -e '.[dev]'" in makefile
    for target in ("demo", "test", "clean"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_every_script_command_runs(tiny_base, tiny_voice, tmp_path):
    """In the README's order, so that export finds the run that training made."""
    data, ran = tiny_voice(6), 0
    (tmp_path / "runs").mkdir()
    for number, command in enumerate(COMMANDS):
        if command in BY_MAKE or command == INSTALL:
            continue
        command = command.replace("scripts/", f"{REPOSITORY}/scripts/").replace("configs/", f"{REPOSITORY}/configs/")
        command = command.replace("accelerate_config.yaml", f"{REPOSITORY}/accelerate_config.yaml")
        flags = []
        if "speak.py" in command:
            flags = ["--preview", "--max_codes", "20"]  # the full chain needs the released models
            shutil.copytree(data, tmp_path / "my_recordings")
        elif "export.py" not in command:
            flags = tiny_run(tiny_base, data, tmp_path, name=f"run-{number}")
            last_run = tmp_path / f"run-{number}"
        else:
            shutil.copytree(last_run, tmp_path / "runs" / "my_voice")
        done = run(command, flags, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 6
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert (tmp_path / "morning.wav").stat().st_size > 1000


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:configs|scripts|docs|examples|tests)/[\w./]+)`", README)))
)
def test_every_file_it_names_exists(name):
    assert (REPOSITORY / name).exists()


def test_every_setting_it_names_exists():
    import dataclasses

    from tortoise_hf.cli import SECTIONS

    known = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
    named = set(re.findall(r"\b((?:data|model|optim|training|callbacks|hub)\.\w+)", README))
    named = {name for name in named if not name.endswith((".py", ".md", ".safetensors"))}
    assert named
    assert named <= known
