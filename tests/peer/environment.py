"""The peer's own environment: tortoise-tts from PyPI with the old libraries it needs, and this project's torch.

Built once, kept under `$TORTOISE_HF_PEER_ENV` (default `.cache/peer-env` in the repository) and used again by the next
run. Torch isn't installed twice: the environment ends its search path with the folder this project's torch lies in.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

# tortoise-tts 3.0.0 asks for transformers 4.31.0; on Python 3.12 there are no wheels of the tokenizers that one needs,
# so the nearest version with some takes its place. The older versions are those strict loaders are pinned to.
RECIPES = {
    (3, 10): ("4.31.0", "0.13.3", ("4.26.1", "4.29.2")),
    (3, 11): ("4.31.0", "0.13.3", ("4.26.1", "4.29.2")),
    (3, 12): ("4.35.2", "0.15.2", ()),
}
# With their dependencies, wheels only. numba sets the upper bound of numpy.
LIBRARIES = (
    "huggingface-hub>=0.19,<1.0",
    "librosa>=0.11,<0.12",
    "scipy>=1.11",
    "einops>=0.7",
    "inflect>=7.0",
    "unidecode>=1.3.8",
    "tqdm",
)
# Without dependencies: rotary_embedding_torch would bring another torch; the others name none they need.
PEERS = ("tortoise-tts==3.0.0", "rotary_embedding_torch==0.8.9", "progressbar==2.5")
NOT_REACHED = re.compile(
    r"No matching distribution|Could not find a version|Could not fetch URL|connection broken|Temporary failure|"
    r"Network is unreachable|ConnectTimeout|Read timed out|Max retries|ProxyError|SSLError",
    re.IGNORECASE,
)


class Unavailable(Exception):
    """The environment can't be built here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A Python that imports tortoise-tts."""

    python: Path
    transformers: str
    """Version it runs with unless told otherwise."""
    older: dict[str, Path]
    """Older transformers versions -> folder to put in front of the search path."""

    def environment(self, transformers: str, threads: int = 2) -> dict[str, str]:
        """Environment variables for a run with one of the versions; no device, no network."""
        values = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
        values |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
        values["NUMBA_CACHE_DIR"] = str(self.python.parent.parent / "numba")
        if transformers != self.transformers:
            values["PYTHONPATH"] = str(self.older[transformers])
        return values


def peer_environment() -> Peer:
    """The environment, built if it isn't there.

    Raises:
        Unavailable: no recipe for this Python, or PyPI can't be reached or lacks a wheel.
        RuntimeError: anything else that goes wrong, with pip's last lines.
    """
    import torch

    version = sys.version_info[:2]
    if version not in RECIPES:
        raise Unavailable(f"tortoise-tts's libraries have no wheels for Python {version[0]}.{version[1]}")
    recipe = RECIPES[version]
    torch_folder = Path(torch.__file__).resolve().parents[1]
    key = json.dumps([recipe, LIBRARIES, PEERS, str(torch_folder), sys.version, platform.machine()])
    default = Path(__file__).resolve().parents[2] / ".cache" / "peer-env"
    root = Path(os.environ.get("TORTOISE_HF_PEER_ENV", default))
    folder = root / f"py{version[0]}{version[1]}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):  # two processes run the tests
        if not folder.is_dir():
            _build(folder, recipe, torch_folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    return Peer(python, recipe[0], {older: folder / f"transformers-{older}" for older in recipe[2]})


def _build(folder: Path, recipe: tuple[str, str, tuple[str, ...]], torch_folder: Path) -> None:
    transformers, tokenizers, older = recipe
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        try:
            venv.create(staging, with_pip=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError as error:
            raise Unavailable("this Python can't make virtual environments (python3-venv is missing)") from error
        python = staging / ("Scripts" if os.name == "nt" else "bin") / "python"
        wanted = (f"transformers=={transformers}", f"tokenizers=={tokenizers}", *LIBRARIES)
        _pip(python, "--only-binary", ":all:", *wanted)
        _pip(python, "--no-deps", *PEERS)
        for version in older:
            _pip(python, "--no-deps", "--target", staging / f"transformers-{version}", f"transformers=={version}")
        packages = next(staging.glob("**/site-packages"))
        # Last on the path: whatever the environment has itself wins.
        (packages / "zz_torch_of_the_project.pth").write_text(f"{torch_folder}\n", encoding="utf-8")
        _check(python, "import torch, torchaudio, transformers, tortoise.models.autoregressive")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check(python: Path, imports: str) -> None:
    done = subprocess.run([python, "-c", imports], capture_output=True, text=True, cwd=python.parent, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer's environment can't be imported:\n{done.stderr[-2000:]}")


def _pip(python: Path, *arguments: object) -> None:
    command = [python, "-m", "pip", "install", "-q", "--retries", "2", "--disable-pip-version-check", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        if NOT_REACHED.search(done.stderr):
            raise Unavailable(f"PyPI can't be reached or lacks a wheel: {errors[0] if errors else 'no message'}")
        raise RuntimeError("pip failed for the peer's environment:\n" + "\n".join(lines[-20:]))
