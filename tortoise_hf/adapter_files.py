"""An adapter's files in PEFT's layout: their names, what they say of themselves, and how much of it is believed.

Somebody else may have made them, and PEFT's config can name modules to import, patterns to match and ways to compute
that nobody here has tried. So it is read here, and peft gets a config of our own making.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tortoise_hf.errors import UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
"""PEFT's names."""
ADAPTER_FILES = (WEIGHTS, CONFIG)
ADAPTER_DIR = "adapter"
"""Folder in an export. Beside config.json, transformers would take the whole export for an adapter."""
BASE = "base_sha256"
"""Where the weights' file names the weights that it belongs to, see `lora.fingerprint`."""
TARGETS: dict[str, tuple[str, ...]] = {
    "gpt": ("c_attn", "c_proj", "c_fc"),
    "conditioning_encoder": ("conditioning_encoder.init", "qkv", "proj_out"),
    "embeddings": ("text_embedding", "mel_embedding", "text_pos_embedding.emb", "mel_pos_embedding.emb"),
    "heads": ("text_head", "mel_head"),
}
"""Layers that get an adapter, by the ends of their names: the GPT's always, the others where they are asked for."""
LARGEST_RANK = 256
_HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*")
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
"""Keys of PEFT's config that change nothing of what a finished adapter adds; they aren't read."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Ends of the names of the layers that are adapted, out of `TARGETS`."""
    base: str | None
    """Repository on the Hub that holds the base; None in a run's folder, whose settings name the base."""
    revision: str | None
    """Of the base's repository: a commit, branch or tag; None for the newest."""

    @property
    def base_name(self) -> str:
        """The base as it is named to people and as model.base."""
        return f"{self.base}@{self.revision}" if self.revision else str(self.base)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in place of a model's weights."""
    return (folder / WEIGHTS).is_file() and not (folder / "model.safetensors").is_file()


def copy_adapter(source: Path, export: Path) -> None:
    """Put an adapter's two files into an export, readable for everybody the export is."""
    (export / ADAPTER_DIR).mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, export / ADAPTER_DIR / name)


def name_base(folder: Path, base: str, revision: str | None) -> None:
    """Write into an adapter's config where others find its base, in the fields that PEFT has for it."""
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base, "revision": revision}
    (folder / CONFIG).unlink()  # what it may be linked to stays as it is
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(folder: Path, name: str | None = None) -> AdapterConfig:
    """What an adapter's config says.

    Args:
        folder: holds it.
        name: of the folder, for messages; default: its path.

    Raises:
        UserError: if it can't be read, or says anything that this program's adapters don't.
    """
    where = f"{name or folder}/{CONFIG}"
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} can't be read as JSON ({type(error).__name__}). Nothing was loaded.") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {type(values).__name__}, expected an object. Nothing was loaded.")

    def require(key: str, good: bool, expected: str) -> None:
        if not good:
            found = repr(values.get(key))
            found = found if len(found) <= 80 else f"{found[:80]}..."
            raise UserError(f"{where} names {key} {found}; expected {expected}. Nothing was loaded.")

    rank, alpha, targets = (values.get(key) for key in ("r", "lora_alpha", "target_modules"))
    known = [target for names in TARGETS.values() for target in names]
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    require("peft_type", values.get("peft_type") == "LORA", "'LORA'")
    require("r", type(rank) is int and 1 <= rank <= LARGEST_RANK, f"a whole number from 1 to {LARGEST_RANK}")
    number = type(alpha) in (int, float) and math.isfinite(alpha) and 0 < alpha <= 1e6
    require("lora_alpha", number, "a number above 0")
    listed = isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)
    require("target_modules", listed and set(targets) <= set(known), f"layers out of {', '.join(known)}")
    require("bias", values.get("bias", "none") == "none", "'none'")
    require("init_lora_weights", type(values.get("init_lora_weights", True)) is bool, "true or false")
    found = isinstance(base, str) and _HUB_REPOSITORY.fullmatch(base) is not None
    require("base_model_name_or_path", base is None or found, "a repository on the Hub, owner/name")
    found = isinstance(revision, str) and _REVISION.fullmatch(revision) is not None
    require("revision", revision is None or found, "a commit, branch or tag")
    read = {"peft_type", "r", "lora_alpha", "target_modules", "bias", "init_lora_weights", "base_model_name_or_path"}
    for key in values.keys() - read - _WITHOUT_EFFECT - {"revision"}:
        require(key, not values[key], "nothing: this program has no such adapters")
    return AdapterConfig(rank, float(alpha), tuple(sorted(set(targets))), base, revision)


def check_adapter_weights(folder: Path, expected: Mapping[str, tuple[int, ...]], name: str | None = None) -> str:
    """Compare names and shapes of an adapter's tensors with those they should have; none of them is read.

    Args:
        folder: holds the file.
        expected: shapes by PEFT's names.
        name: see `read_adapter_config`.

    Returns: fingerprint of the weights that the adapter belongs to.

    Raises:
        UserError: naming the first tensor that is wrong.
    """
    where = f"{name or folder}/{WEIGHTS}"
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            belongs_to = (file.metadata() or {}).get(BASE, "")
            slices: dict[str, Any] = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(one.get_shape()) for key, one in slices.items()}
            kinds = {key: one.get_dtype() for key, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} is not a sound safetensors file ({error}). Nothing was loaded.") from error
    wrong = [key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)]
    if wrong:
        key = min(wrong)
        raise UserError(
            f"{where} doesn't fit {CONFIG} and config.json: {len(wrong)} of {len(expected)} tensors differ, first "
            f"{key[:200]} ({shapes.get(key, 'missing')} instead of {expected.get(key, 'nothing')}). Nothing was loaded."
        )
    wrong = [key for key, kind in kinds.items() if kind not in ("F32", "F16", "BF16")]
    if wrong:
        raise UserError(
            f"{where} holds {kinds[wrong[0]]} in {wrong[0]}; expected floating point of 16 or 32 bits. Nothing was "
            "loaded."
        )
    if re.fullmatch("[0-9a-f]{64}", belongs_to) is None:
        raise UserError(
            f"{where} doesn't say which weights it belongs to ({BASE} in its header is {belongs_to[:80]!r}); it was "
            "not made by this program. Nothing was loaded."
        )
    return belongs_to
