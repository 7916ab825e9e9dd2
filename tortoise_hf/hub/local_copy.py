"""Put a pulled voice into a folder of one's own; an adapter becomes whole there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tortoise_hf.adapter_files import is_adapter
from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export import MARKER, SUMMARY, export_model
from tortoise_hf.latents import CLIPS_FOLDER, LATENTS_NAME
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import BaseFiles, load_gpt, resolve_base

_WEIGHT_BYTES = 8
"""Of a whole voice on the disk, per weight: float32 in model.safetensors and again in TorToiSe's layout."""


def fetch_whole(folder: Path, weights_dir: str | None = None) -> tuple[BaseFiles, TortoiseGPT]:
    """Fetch what an adapter belongs to, and merge it.

    Args:
        folder: of the pulled adapter.
        weights_dir: folder with the released files, if there is one.

    Returns: the files it is made of, and the GPT.

    Raises:
        UserError: if the base can't be had, or isn't the one that the adapter was trained on.
    """
    files = resolve_base(ModelConfig(base=str(folder), weights_dir=weights_dir), dvae=False)
    return files, load_gpt(files)


def copy_voice(folder: Path, target: Path, weights_dir: str | None = None) -> None:
    """Put a pulled voice into a folder of one's own, without links into the cache.

    Args:
        folder: of the voice. What an adapter becomes is an export as its run made it: whole weights, also in TorToiSe's
            layout, and the adapter in a folder of its own.
        target: folder to make.
        weights_dir: see `fetch_whole`.

    Raises:
        UserError: if the folder holds something already or can't be written, or as `fetch_whole`.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; name a folder that isn't there yet.")
    staging = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        if is_adapter(folder):
            _write_whole(folder, staging, weights_dir)
        else:
            # Content alone: files of the cache may be read-only.
            shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(".*"), copy_function=shutil.copyfile)
        if target.is_dir():
            target.rmdir()
        staging.rename(target)
    except (OSError, SafetensorError, RuntimeError) as error:  # what a full disk is to files, safetensors and torch
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise UserError(f"{target} can't be written ({reason}).") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_whole(folder: Path, staging: Path, weights_dir: str | None) -> None:
    files, gpt = fetch_whole(folder, weights_dir)
    staging.parent.mkdir(parents=True, exist_ok=True)
    needed = _WEIGHT_BYTES * sum(value.numel() for value in gpt.parameters())
    free = shutil.disk_usage(staging.parent).free
    if needed > free:
        raise UserError(
            f"The merged voice needs {needed / 1e9:.2f} GB and the disk of {staging.parent} has {free / 1e9:.2f} GB "
            "left. Free some space, or name another folder."
        )
    step = _read_json(folder / MARKER).get("step")
    step = step if type(step) is int and 0 <= step < 10**12 else 0  # it names a file
    export_model(gpt, staging, files=files, step=step, summary=_read_json(folder / SUMMARY), adapter=folder)
    if (folder / LATENTS_NAME).is_file():
        shutil.copyfile(folder / LATENTS_NAME, staging / LATENTS_NAME)
    if (folder / CLIPS_FOLDER).is_dir():
        shutil.copytree(folder / CLIPS_FOLDER, staging / CLIPS_FOLDER, copy_function=shutil.copyfile)


def _read_json(path: Path) -> dict[str, Any]:
    """A file that was looked at when it was pulled; what somebody else's adapter lacks is empty."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
