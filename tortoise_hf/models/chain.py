"""The released models that turn a GPT's codes into sound: which file or folder each comes from, and loading it.

A part is looked for in a folder of one's own (`weights_dir`), either as `<part>/config.json` + `model.safetensors`, as
`save_pretrained` writes it, or as the released `.pth`; what isn't there is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, UnivNetModel

from tortoise_hf.errors import UserError
from tortoise_hf.models.checkpoint_formats import check_weights, read_tensors
from tortoise_hf.models.clvp import CLVP, CLVPConfig
from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder
from tortoise_hf.models.random_latents import RandomLatents, RandomLatentsConfig
from tortoise_hf.models.released import fetch_released
from tortoise_hf.models.vocoder import RELEASED_VOCODER, convert_vocoder_weights


@dataclass(frozen=True)
class Part:
    """A model of the chain: its released file, its class and the released sizes."""

    file: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig


PARTS = {
    "clvp": Part("clvp2.pth", CLVP, CLVPConfig()),
    "diffusion": Part("diffusion_decoder.pth", DiffusionDecoder, DiffusionConfig()),
    "vocoder": Part("vocoder.pth", UnivNetModel, RELEASED_VOCODER),
    "random_gpt": Part("rlg_auto.pth", RandomLatents, RandomLatentsConfig(hidden_size=1024)),
    "random_diffusion": Part("rlg_diffuser.pth", RandomLatents, RandomLatentsConfig(hidden_size=2048)),
}


def find_parts(
    names: Iterable[str],
    weights_dir: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
) -> dict[str, Path]:
    """Where each part lies on this machine, fetching what isn't there yet.

    Args:
        names: keys of `PARTS`.
        weights_dir: folder to look in first; see above, and `fetch_released`.
        cache_dir: the Hub's cache, see `fetch_released`.
        endpoint: the Hub's address, see `fetch_released`.
        offline: take what is on this machine only, see `fetch_released`.

    Returns: a folder or a `.pth` file for each.
    Raises: UserError: if a part is nowhere to be had.
    """
    names = list(names)
    found: dict[str, Path] = {}
    if weights_dir is not None:
        for name in names:
            if (Path(weights_dir) / name / "config.json").is_file():
                found[name] = Path(weights_dir) / name
    files = {name: PARTS[name].file for name in names if name not in found}
    if files:
        fetched = fetch_released(
            files.values(), weights_dir, cache_dir=cache_dir, endpoint=endpoint, offline=offline, option="weights_dir"
        )
        found |= {name: fetched[file].path for name, file in files.items()}
    return found


def load_part(name: str, path: Path) -> PreTrainedModel:
    """A part of the chain, on the CPU, in evaluation mode and without gradients.

    Weights stay mapped from the file until they are moved or converted.

    Args:
        name: key of `PARTS`.
        path: from `find_parts`.

    Raises: UserError: if the file is damaged or its tensors aren't those of the model.
    """
    config = part_config(name, path)
    weights = read_tensors(path / "model.safetensors" if path.is_dir() else path)
    if name == "vocoder":
        weights = convert_vocoder_weights(weights)
    with torch.device("meta"):
        model = PARTS[name].model_class(config)
    layout = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in model.state_dict().items()}
    check_weights(weights, layout, path)
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def part_config(name: str, path: Path) -> PreTrainedConfig:
    """Sizes of a part, without loading it: the folder's config.json, or the released ones."""
    part = PARTS[name]
    if not path.is_dir():
        return part.config
    try:
        return type(part.config).from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} can't be read ({error}); get the folder again.") from error
