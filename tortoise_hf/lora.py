"""LoRA: train small matrices beside frozen weights, keep only them, and merge them where a whole model is needed.

The library `peft` puts them in; `TortoiseGPT` stays what it is, with wider layers inside. Files are in PEFT's layout:
`adapter_model.safetensors` and `adapter_config.json`, readable with `peft.PeftModel.from_pretrained(gpt, folder)`.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tortoise_hf.config import LoraConfig
from tortoise_hf.errors import UserError
from tortoise_hf.models.pretrained import BaseFiles, load_gpt

if TYPE_CHECKING:
    from tortoise_hf.models.gpt import TortoiseGPT

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
"""PEFT's names."""
ADAPTER_FILES = (WEIGHTS, CONFIG)
ADAPTER_DIR = "adapter"
"""Folder in an export. Beside config.json, transformers would take the whole export for an adapter."""
BASE = "base_sha256"
"""Where the weights' file names the weights that it belongs to, see `fingerprint`."""
TARGETS: dict[str, tuple[str, ...]] = {
    "gpt": ("c_attn", "c_proj", "c_fc"),
    "conditioning_encoder": ("conditioning_encoder.init", "qkv", "proj_out"),
    "embeddings": ("text_embedding", "mel_embedding", "text_pos_embedding.emb", "mel_pos_embedding.emb"),
    "heads": ("text_head", "mel_head"),
}
"""Layers that get an adapter, by the ends of their names: the GPT's always, the others where they are asked for."""
_PREFIX = "base_model.model."  # of names in PEFT's files
_NAME = ".default"  # of the only adapter, in names of parameters


def add_adapter(model: TortoiseGPT, cfg: LoraConfig, seed: int) -> None:
    """Freeze a model's weights and put an adapter into it that changes nothing yet.

    Args:
        model: whole, in float32, on the CPU.
        cfg: of rank 1 or more.
        seed: of the matrices that don't begin as zeros; random numbers are left as they were.
    """
    model.adapter_base = fingerprint(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widen(model, cfg)


def widen(model: TortoiseGPT, cfg: LoraConfig) -> None:
    """Freeze a model's weights and put fresh matrices beside them, on whatever device they are."""
    import peft

    chosen = [name for part, names in TARGETS.items() if part == "gpt" or getattr(cfg, part) for name in names]
    values = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=chosen, fan_in_fan_out=True
    )
    with _expected_warnings():
        peft.inject_adapter_in_model(values, model)


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether `add_adapter` was called on a model."""
    return hasattr(model, "adapter_base")


def num_weights(model: torch.nn.Module) -> tuple[int, int]:
    """How many weights the model has once an adapter is merged, and how many a checkpoint keeps."""
    total = sum(value.numel() for value in model.parameters())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return (total - trained, trained) if has_adapter(model) else (total, total)


def adapter_names(model: torch.nn.Module) -> dict[str, str]:
    """Names of an adapter's parameters in the model, and what they are called in PEFT's files."""
    return {name: _PREFIX + name.replace(_NAME, "") for name, value in model.named_parameters() if value.requires_grad}


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Sha256 of a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(model: TortoiseGPT, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's two files, and the model's own config for its sizes.

    Args:
        model: with an adapter.
        folder: which exists.
        weights: whole tensors by the adapter's `adapter_names` in the model.
    """
    names = adapter_names(model)
    tensors = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", BASE: model.adapter_base})
    model.peft_config["default"].save_pretrained(folder)
    model.config.save_pretrained(folder)


def read_adapter(model: TortoiseGPT, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's weights out of its file, by their names in a model that has such an adapter.

    Raises:
        UserError: if the file belongs to other weights, or to another adapter.
    """
    _check_base(folder, model.adapter_base)
    found, names = load_file(folder / WEIGHTS), adapter_names(model)
    if found.keys() != set(names.values()):
        raise UserError(
            f"{folder / WEIGHTS} holds {len(found):,} tensors that are not the {len(names):,} of this run's adapter; "
            "set the lora section back to what it was, or name another training.output_dir."
        )
    return {name: found[stored] for name, stored in names.items()}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in place of a model's weights."""
    return (folder / WEIGHTS).is_file()


def load_trained(checkpoint: Path, files: BaseFiles) -> TortoiseGPT:
    """The whole model of a checkpoint in float32 on the CPU; an adapter is merged into the base that it was trained on.

    Raises:
        UserError: if an adapter belongs to other weights than the base's, or these can't be read.
    """
    from tortoise_hf.models.gpt import TortoiseGPT

    if not is_adapter(checkpoint):
        return TortoiseGPT.from_pretrained(checkpoint, dtype=torch.float32)
    return merge_adapter(load_gpt(files), checkpoint)


def merge_adapter(model: TortoiseGPT, folder: Path) -> TortoiseGPT:
    """The same model with an adapter's changes added to its weights, and no adapter left.

    Raises:
        UserError: if the adapter belongs to other weights.
    """
    import peft

    _check_base(folder, fingerprint(model.state_dict()))
    with _expected_warnings():
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().requires_grad_(True)


def copy_adapter(source: Path, export: Path) -> None:
    """Put an adapter's two files into an export, readable for everybody the export is."""
    (export / ADAPTER_DIR).mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, export / ADAPTER_DIR / name)


def _check_base(folder: Path, base: str) -> None:
    with safe_open(folder / WEIGHTS, "pt") as file:
        trained_on = (file.metadata() or {}).get(BASE)
    if trained_on != base:
        raise UserError(
            f"{folder / WEIGHTS} was trained on other weights than those that model.base names now (sha256 "
            f"{str(trained_on)[:12]}, now {base[:12]}); an adapter is of no use without them. Bring them back, or name "
            "another training.output_dir."
        )


@contextmanager
def _expected_warnings() -> Iterator[Any]:
    """GPT-2's matrices lie the other way round than those of linear layers; peft finds that out, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield
