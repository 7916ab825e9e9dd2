"""Settings that name places on this machine: where these are, and what of them others may see."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tortoise_hf.hub.pull import is_hub_name

PATH_SETTINGS = (
    "data.root", "data.train_list", "data.eval_list", "data.cache_dir", "model.base", "model.weights_dir",
    "model.tokenizer", "training.output_dir", "training.resume",
)  # fmt: skip
"""Settings that name places on this machine."""
_READ_LATER = ("data.root", "data.cache_dir", "model.base", "model.weights_dir", "model.tokenizer")
"""Those that what is done with a finished run reads."""


def absolute_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with places that hold from any folder, as far as they are still where they were.

    Args:
        record: content of the run's run.json.
    """
    settings = {section: dict(values) for section, values in record["config"].items()}
    began_in = Path(record.get("cwd", "."))
    for key in _READ_LATER:
        section, name = key.split(".")
        value = settings.get(section, {}).get(name)
        if isinstance(value, str) and value != "released" and (began_in / value).exists():
            settings[section][name] = str((began_in / value).absolute())
    return settings


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the last part only of whatever names a place on this machine; what concerns the Hub is left out."""
    public = {section: dict(values) for section, values in settings.items() if section != "hub"}
    for key in PATH_SETTINGS:
        section, name = key.split(".")
        value = public.get(section, {}).get(name)
        if isinstance(value, str) and ("/" in value or "\\" in value) and not is_hub_name(value):
            public[section][name] = Path(value.replace("\\", "/")).name
    return public


def local_paths(settings: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Absolute folders that nothing uploaded may name."""
    places = [settings.get(key.split(".")[0], {}).get(key.split(".")[1]) for key in PATH_SETTINGS]
    found = [str(Path(place).expanduser()) for place in places if isinstance(place, str)]
    return [path for path in [*found, str(run_dir.absolute()), os.getcwd()] if os.path.isabs(path)]
