"""What a pulled voice's files say of themselves, looked at before anything of it is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tortoise_hf.adapter_files import CONFIG as ADAPTER_CONFIG
from tortoise_hf.adapter_files import is_adapter
from tortoise_hf.errors import UserError
from tortoise_hf.latents import LATENTS_NAME
from tortoise_hf.lora import check_adapter
from tortoise_hf.models.checkpoint_formats import published_layout, read_gpt_weights
from tortoise_hf.models.gpt import GPTConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MOST_JSON_BYTES = 20_000_000
"""Largest JSON file taken. The largest of a voice is its tokenizer, a few hundred kB."""
LARGEST = {
    "num_layers": 200, "hidden_size": 8192, "num_heads": 256, "num_text_tokens": 100_000, "max_text_tokens": 100_000,
    "num_mel_codes": 100_000, "max_mel_tokens": 100_000, "max_conditioning_inputs": 100, "num_mel_bins": 1000,
    "num_conditioning_layers": 100,
}  # fmt: skip
"""Largest sizes a config may name: far above any GPT of TorToiSe, far below what harms a machine."""


def check_contents(folder: Path, name: str) -> None:
    """Whether a voice's files say of themselves what a voice's may: JSON that parses, sizes and shapes within reason.

    Raises:
        UserError: what is wrong. Tensors are not read yet, but for pickled weights, which are opened without code.
    """
    for path in sorted(folder.glob("**/*.json")):
        read_json(path, f"{name}/{path.relative_to(folder).as_posix()}")
    config = gpt_config(read_json(folder / CONFIG, f"{name}/{CONFIG}"), name)
    for path in folder.rglob("*.safetensors"):
        shapes = safetensors_shapes(path, f"{name}/{path.relative_to(folder).as_posix()}")
        if path == folder / LATENTS_NAME and shapes.get("gpt") != (1, config.hidden_size):
            raise UserError(
                f"{name}/{LATENTS_NAME} holds {shapes.get('gpt', 'nothing')} for the GPT, expected "
                f"{(1, config.hidden_size)}. Nothing was loaded."
            )
    if is_adapter(folder):
        named = check_adapter(folder, config, name)[0]
        if named.base is None:
            raise UserError(
                f"{name}/{ADAPTER_CONFIG} doesn't say which repository the adapter's base is in "
                "(base_model_name_or_path). Nothing was loaded."
            )
        return
    layout = {key: shape for key, (shape, _) in published_layout(config, attention_buffers=False).items()}
    if (folder / WEIGHTS).is_file():
        shapes = safetensors_shapes(folder / WEIGHTS, f"{name}/{WEIGHTS}")
    else:
        path = next(path for path in folder.glob("*.pth"))
        shapes = {key: tuple(tensor.shape) for key, tensor in read_gpt_weights(path).items()}
    wrong = [key for key in layout.keys() | shapes.keys() if layout.get(key) != shapes.get(key)]
    if wrong:
        key = min(wrong)
        raise UserError(
            f"{name}: weights and {CONFIG} don't belong together: {len(wrong)} of {len(layout)} tensors differ, first "
            f"{key} ({shapes.get(key, 'missing')} instead of {layout.get(key, 'nothing')}). Nothing was loaded."
        )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON file of someone else.

    Raises: UserError: if it is too large, isn't JSON, is nested too deeply, or isn't an object.
    """
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{name} has {path.stat().st_size:,} bytes; at most {MOST_JSON_BYTES:,} are read.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} can't be read as JSON ({type(error).__name__}). Nothing was loaded.") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} holds {type(value).__name__}, expected an object. Nothing was loaded.")
    return value


def gpt_config(values: Mapping[str, Any], name: str) -> GPTConfig:
    """The sizes of a voice's GPT.

    Raises: UserError: if it is another model's config, or names absurd sizes.
    """
    if values.get("model_type") != GPTConfig.model_type:
        raise UserError(
            f"{name} is not a voice of this program: its {CONFIG} describes model_type {values.get('model_type')!r}, "
            f"expected {GPTConfig.model_type!r}."
        )
    for key, most in LARGEST.items():
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(
                f"{name}: {CONFIG} names {key} {value!r}; expected a whole number from 1 to {most:,}. Nothing was "
                "loaded."
            )
    try:
        return GPTConfig.from_dict({key: values[key] for key in LARGEST if key in values})
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {CONFIG} is not usable ({error}).") from error


def safetensors_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes out of a file's header, which must account for every byte of the file.

    Raises: UserError: if it doesn't.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= min(size - 8, MOST_JSON_BYTES):
                raise ValueError(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if max(ends, default=0) != size - 8 - length:
            raise ValueError("its tensors don't fill the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise UserError(f"{name} is not a sound safetensors file ({error}). Nothing was loaded.") from error
    return shapes
