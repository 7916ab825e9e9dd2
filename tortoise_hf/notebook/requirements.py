"""Install what the package needs into a machine that is lent, and leave its own PyTorch alone if that works.

Colab and Kaggle bring a PyTorch that fits their driver; fetching another one takes gigabytes and minutes. Nothing but
the standard library is imported here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

PACKAGE = "tortoise_hf"
OLDEST_TORCH = (2, 9)
"""Oldest pair of torch and torchaudio that this package's tests passed with."""
PAIR = ("torch", "torchaudio")
_TRY = "import torch, torchaudio; torchaudio.functional.resample(torch.zeros(100), 100, 50)"


def install() -> None:
    """Install the package's requirements and say what was done.

    Raises:
        CellStopped: if pip fails, with the end of what it said.
    """
    from tortoise_hf.notebook.cell import CellStopped

    started = time.perf_counter()
    kept = working_torch()
    wanted = requirements(metadata.requires(PACKAGE) or (), kept)
    before, loaded = installed_versions(), set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "kept.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in (kept or {}).items()), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins)]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode != 0:
        raise CellStopped("The installation failed:\n" + (done.stdout + done.stderr)[-2000:])
    after = installed_versions()
    changed = [name for name, version in after.items() if before.get(name) != version]
    torch = f"PyTorch {kept['torch']} works and stays." if kept else "PyTorch was installed."
    print(f"{torch} {len(changed)} packages installed or renewed in {time.perf_counter() - started:.0f} s.")
    stale = sorted(name for name in changed if name in before and name.replace("-", "_") in loaded)
    if stale:
        print(f"In use were {', '.join(stale)}: restart the session (menu Runtime), then run all cells from the first.")


def working_torch() -> dict[str, str] | None:
    """Versions of the pair of torch and torchaudio that is installed; None if it doesn't work or is too old."""
    try:
        # As pip knows them: torch itself adds what it was built for.
        versions = {name: metadata.version(name) for name in PAIR}
    except metadata.PackageNotFoundError:
        return None
    found = tuple(int(part) for part in re.findall(r"\d+", versions["torch"])[:2])
    if found < OLDEST_TORCH or subprocess.run([sys.executable, "-c", _TRY], capture_output=True).returncode != 0:
        return None
    return versions


def requirements(declared: Iterable[str], kept: Mapping[str, str] | None) -> list[str]:
    """What pip is to install: all requirements without extras, and without the pair if that stays."""
    plain = [line for line in declared if "extra ==" not in line]
    return [line for line in plain if not (kept and re.match(r"[\w-]+", line)[0] in PAIR)]


def installed_versions() -> dict[str, str]:
    """Every installed package's version."""
    return {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
