"""What a base's folder holds, by the names of its files; the layout is told in `pretrained.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tortoise_hf.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from tortoise_hf.errors import UserError
from tortoise_hf.models.gpt import GPTConfig

RELEASED_BASE = "released"
RELEASED_REPO = "jbetker/tortoise-tts-v2"
_MEL_NORMS_NAMES = ("mel_norms.safetensors", "mel_norms.pth", "mel_norms.json")


def look_into_base(base: Path, from_scratch: bool) -> dict[str, Path]:
    """What a folder or a weights file brings along: paths by the names of `BaseFiles`.

    Args:
        base: the folder or file.
        from_scratch: whether its weights are left out.

    Raises: UserError: if it isn't there, is ambiguous, or holds a config that can't be used.
    """
    if base.is_file():
        folder, weights = base.parent, base
    elif base.is_dir():
        folder, weights = base, _weights_in(base)
    else:
        raise UserError(
            f"model.base: {base} is neither a folder nor a file; give one, the name of a voice on the Hub "
            f"(owner/name), or {RELEASED_BASE!r} for TorToiSe's own weights."
        )
    found: dict[str, Path] = {}
    if weights is not None and not from_scratch:
        found["gpt_weights"] = weights
    config = folder / "config.json"
    if config.is_file():
        read_config(config, GPTConfig)  # a wrong file is named before gigabytes are fetched
        found["gpt_config"] = config
        if weights is None and not from_scratch:
            raise UserError(
                f"model.base: {folder} holds a config.json but no weights (model.safetensors or <step>_gpt.pth); add "
                f"them, pass --model.from_scratch true to start from random ones, or take config.json away to start "
                f"from the released ones."
            )
    if (folder / "tokenizer.json").is_file():
        found["tokenizer"] = folder / "tokenizer.json"
    norms = next((folder / name for name in _MEL_NORMS_NAMES if (folder / name).is_file()), None)
    if norms is not None:
        found["mel_norms"] = norms
    if (folder / "dvae" / "model.safetensors").is_file():
        found["dvae_weights"] = folder / "dvae" / "model.safetensors"
        if (folder / "dvae" / "config.json").is_file():
            found["dvae_config"] = folder / "dvae" / "config.json"
    elif (folder / "dvae.pth").is_file():
        found["dvae_weights"] = folder / "dvae.pth"
    return found


def _weights_in(folder: Path) -> Path | None:
    for name in ("model.safetensors", "autoregressive.pth"):
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(folder.glob("*_gpt.pth"))
    if len(candidates) > 1:
        raise UserError(
            f"model.base: {folder} holds {len(candidates)} weights files: "
            f"{', '.join(path.name for path in candidates)}. Name one of them as model.base."
        )
    if not candidates and (folder / ADAPTER_WEIGHTS).is_file():
        return folder / ADAPTER_WEIGHTS
    return candidates[0] if candidates else None


def read_config(path: Path, config_class: type[Any]) -> Any:
    """A model's config.json.

    Raises: UserError: if it is another model's, or names sizes that can't be.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read as JSON ({error}); expected a {config_class.model_type} config."
        ) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != config_class.model_type:
        raise UserError(f"{path} describes model_type {kind!r}, expected {config_class.model_type!r}.")
    counts = [name for name, default in vars(config_class).items() if type(default) is int]
    wrong = [name for name in counts if name in values and not (type(values[name]) is int and values[name] > 0)]
    if wrong:
        raise UserError(
            f"{path}: {', '.join(f'{name} is {values[name]!r}' for name in wrong)}; expected whole numbers above 0."
        )
    try:
        return config_class.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a usable {config_class.model_type} config: {error}") from error
