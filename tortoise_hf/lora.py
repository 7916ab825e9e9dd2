"""LoRA: train small matrices beside frozen weights, keep only them, and merge them where a whole model is needed.

The library `peft` puts them in; `TortoiseGPT` stays what it is, with wider layers inside. Files are in PEFT's layout:
`adapter_model.safetensors` and `adapter_config.json`, readable with `peft.PeftModel.from_pretrained(gpt, folder)`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import initialization

from tortoise_hf.adapter_files import (
    BASE,
    TARGETS,
    WEIGHTS,
    AdapterConfig,
    check_adapter_weights,
    read_adapter_config,
)
from tortoise_hf.config import LoraConfig
from tortoise_hf.errors import UserError
from tortoise_hf.models.released import file_sha256

if TYPE_CHECKING:
    import peft

    from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

_PREFIX = "base_model.model."  # of names in PEFT's files
_NAME = ".default"  # of the only adapter, in names of parameters


def add_adapter(model: TortoiseGPT, cfg: LoraConfig, seed: int) -> None:
    """Freeze a model's weights and put an adapter into it that changes nothing yet.

    Args:
        model: whole, in float32, on the CPU.
        cfg: of rank 1 or more.
        seed: of the matrices that don't begin as zeros; random numbers are left as they were.
    """
    model.adapter_base = fingerprint(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widen(model, cfg)


def widen(model: TortoiseGPT, cfg: LoraConfig) -> None:
    """Freeze a model's weights and put fresh matrices beside them, on whatever device they are."""
    chosen = [name for part, names in TARGETS.items() if part == "gpt" or getattr(cfg, part) for name in names]
    _inject(model, _peft_config(cfg.rank, cfg.alpha, cfg.dropout, chosen))


def _peft_config(rank: int, alpha: float, dropout: float, targets: list[str]) -> peft.LoraConfig:
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=True)


def _inject(model: TortoiseGPT, values: peft.LoraConfig) -> None:
    import peft

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


def fingerprint(model: TortoiseGPT) -> str:
    """Sha256 that stands for a model's weights, whatever file they came from.

    Of weights that an adapter was merged into, it is that of what was merged (`merged_fingerprint`): every processor
    rounds such sums in its own way.
    """
    merged_from = getattr(model, "merged_from", None)
    if merged_from is not None:
        return merged_from
    digest, weights = hashlib.sha256(), model.state_dict()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def merged_fingerprint(folder: Path, *more: str) -> str:
    """Sha256 that stands for an adapter merged into its base, which the adapter's file names by its own fingerprint.

    Args:
        folder: of the adapter.
        more: whatever else the weights were made from.
    """
    config = read_adapter_config(folder)
    parts = [file_sha256(folder / WEIGHTS), config.rank, config.alpha, *more]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
    with safe_open(folder / WEIGHTS, "pt") as file:
        _check_base(folder, (file.metadata() or {}).get(BASE, ""), model.adapter_base)
    found, names = load_file(folder / WEIGHTS), adapter_names(model)
    if found.keys() != set(names.values()):
        raise UserError(
            f"{folder / WEIGHTS} holds {len(found):,} tensors that are not the {len(names):,} of this run's adapter; "
            "set the lora section back to what it was, or name another training.output_dir."
        )
    return {name: found[stored] for name, stored in names.items()}


def check_adapter(folder: Path, sizes: GPTConfig, name: str | None = None) -> tuple[AdapterConfig, str]:
    """See that an adapter's files are those of a GPT of these sizes; no tensor is read.

    Args:
        folder: of the adapter.
        sizes: of the GPT.
        name: of the folder, for messages; default: its path.

    Returns: its config, and the fingerprint of the weights that it belongs to.

    Raises:
        UserError: what is wrong or unexpected.
    """
    from tortoise_hf.models.gpt import TortoiseGPT

    config = read_adapter_config(folder, name)
    with torch.device("meta"), initialization.no_init_weights():
        model = TortoiseGPT(sizes)
    _inject(model, _peft_config(config.rank, config.alpha, 0.0, list(config.targets)))
    names, values = adapter_names(model), dict(model.named_parameters())
    expected = {stored: tuple(values[name].shape) for name, stored in names.items()}
    return config, check_adapter_weights(folder, expected, name)


def merge_adapter(model: TortoiseGPT, folder: Path, base: str | None = None) -> TortoiseGPT:
    """The same model with an adapter's changes added to its weights, and no adapter left.

    Args:
        model: what the adapter was trained on, in float32 on the CPU.
        folder: of the adapter.
        base: name of the place that the adapter says its base is at; None for an adapter of a run's own.

    Raises:
        UserError: if the adapter belongs to other weights, or isn't one of this program's.
    """
    import peft

    config, belongs_to = check_adapter(folder, model.config)
    _check_base(folder, belongs_to, fingerprint(model), base)
    values = _peft_config(config.rank, config.alpha, 0.0, list(config.targets))
    with _expected_warnings(), torch.random.fork_rng(devices=[]):
        adapted = peft.PeftModel.from_pretrained(model, folder, config=values, torch_device="cpu")
        merged = adapted.merge_and_unload().requires_grad_(True)
    merged.merged_from = None
    return merged


def _check_base(folder: Path, trained_on: str, found: str, base: str | None = None) -> None:
    if trained_on == found:
        return
    figures = f"(sha256 {trained_on[:12]}, now {found[:12]})"
    if base is not None:
        raise UserError(
            f"{folder / WEIGHTS} was trained on other weights than those of {base} {figures}, so both together are no "
            "voice; ask its maker for the base, or take another revision of the adapter."
        )
    raise UserError(
        f"{folder / WEIGHTS} was trained on other weights than those that model.base names now {figures}; an adapter "
        "is of no use without them. Bring them back, or name another training.output_dir."
    )


@contextmanager
def _expected_warnings() -> Iterator[Any]:
    """GPT-2's matrices lie the other way round than those of linear layers; peft finds that out, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield
