"""The file formats autoregressive weights travel in: what is in them, reading any of them, writing the published one.

The published `autoregressive.pth` is a bare state dict of 410 tensors plus two attention buffers per layer that old
transformers versions kept. People's own files add prefixes, halves, CUDA storages, wrappers and duplicates; all of them
are read into the same 410 names here, and whatever doesn't fit is refused by name.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tortoise_hf.errors import UserError
from tortoise_hf.models.gpt import GPTConfig

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key -> (shape, dtype), in the order of the published file."""

# Exact on purpose: "ends with attn.bias" would also take `attn.c_attn.bias`, a weight.
_ATTENTION_BUFFER = re.compile(r"^gpt\.h\.\d+\.attn\.(bias|masked_bias)$")
# tortoise-tts builds its generation wrapper inside the module; saved afterwards, every weight is there twice or thrice.
_DUPLICATE = re.compile(r"^(inference_model\..*|gpt\.w[tp]e\.weight)$")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "gpt", "model_g")  # the last: vocoder.pth
_HEAD_SIZE = 64  # width per attention head of every TorToiSe GPT; weights don't tell the number of heads
_MASKED_BIAS = -1e4  # GPT-2's value for masked scores in transformers before 4.30
_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES_SHOWN = 40


def published_layout(config: GPTConfig, attention_buffers: bool = True, dtype: torch.dtype = torch.float32) -> Layout:
    """Key table of an `autoregressive.pth` of this size: 470 keys at the released size, 410 without buffers.

    Args:
        config: sizes of the model.
        attention_buffers: with `gpt.h.N.attn.bias` (uint8, lower triangular) and `gpt.h.N.attn.masked_bias`, which
            strict loaders with transformers up to 4.29 demand.
        dtype: of the weights; the buffers keep theirs.

    Returns: key -> (shape, dtype), in the published order.
    """
    width, positions = config.hidden_size, config.text_positions + config.mel_positions
    table: dict[str, tuple[int, ...]] = {}

    def add(name: str, weight: tuple[int, ...], bias: int | None = None) -> None:
        table[f"{name}.weight"] = weight
        if bias is not None:
            table[f"{name}.bias"] = (bias,)

    add("conditioning_encoder.init", (width, config.num_mel_bins, 1), width)
    for block in range(config.num_conditioning_layers):
        name = f"conditioning_encoder.attn.{block}"
        add(f"{name}.norm", (width,), width)
        add(f"{name}.qkv", (3 * width, width, 1), 3 * width)
        add(f"{name}.proj_out", (width, width, 1), width)
    add("text_embedding", (config.text_vocabulary, width))
    add("mel_embedding", (config.mel_vocabulary, width))
    for layer in range(config.num_layers):
        name = f"gpt.h.{layer}"
        add(f"{name}.ln_1", (width,), width)
        table[f"{name}.attn.bias"] = (1, 1, positions, positions)
        table[f"{name}.attn.masked_bias"] = ()
        add(f"{name}.attn.c_attn", (width, 3 * width), 3 * width)
        add(f"{name}.attn.c_proj", (width, width), width)
        add(f"{name}.ln_2", (width,), width)
        add(f"{name}.mlp.c_fc", (width, 4 * width), 4 * width)
        add(f"{name}.mlp.c_proj", (4 * width, width), width)
    add("gpt.ln_f", (width,), width)
    add("mel_pos_embedding.emb", (config.mel_positions, width))
    add("text_pos_embedding.emb", (config.text_positions, width))
    add("final_norm", (width,), width)
    add("text_head", (config.text_vocabulary, width), config.text_vocabulary)
    add("mel_head", (config.mel_vocabulary, width), config.mel_vocabulary)

    buffer_dtypes = {"bias": torch.uint8, "masked_bias": torch.float32}
    layout: Layout = {}
    for key, shape in table.items():
        buffer = _ATTENTION_BUFFER.match(key)
        if buffer is None:
            layout[key] = (shape, dtype)
        elif attention_buffers:
            layout[key] = (shape, buffer_dtypes[buffer.group(1)])
    return layout


def fits_tortoise(config: GPTConfig) -> bool:
    """Whether TorToiSe's programs can load a GPT of these sizes: theirs are fixed to those of the release."""
    released = GPTConfig()
    return config.num_heads == released.num_heads and published_layout(config) == published_layout(released)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` or PyTorch file, on the CPU, under the file's own names.

    Pickles are opened with `weights_only=True`, so nothing in them is executed. Large files are mapped, not read.

    Raises: UserError: if the file is missing, damaged, holds code, or isn't a table of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected weights (.pth or .safetensors).")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read as safetensors ({error}); fetch or export it again.") from error
    return _unwrap(_load_pickle(path), path)


def _load_pickle(path: Path) -> Any:
    try:
        # Only the zip format of PyTorch 1.6 and later can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own message isn't shown: it advises to switch the safety off.
        found = re.search(r"GLOBAL (\S+)|unrecognized function (\S+)|unsupported class (\S+)", str(error))
        if found is not None:
            raise UserError(
                f"{path} holds Python objects besides tensors ({found[found.lastindex]}), which could run code when "
                f"opened, so it was not opened; ask for a file with the bare weights, or convert it to safetensors "
                f"where you trust it."
            ) from None
        raise UserError(
            f"{path} is damaged, holds code, or is not a PyTorch file (perhaps a web page or a Git LFS pointer that "
            f"was saved in its place); fetch it again."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not a PyTorch file ({reason}); fetch it again.") from error


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping) and "optimizers" in content:
        raise UserError(
            f"{path} is a training state of DL-Art-School (optimizers and counters), not weights; "
            f"the weights are in models/<step>_gpt.pth of the same run."
        )
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
            content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds {type(content).__name__}, expected a table of weights by name.")
    strangers = [
        str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if strangers:
        raise UserError(
            f"{path} holds entries that aren't tensors with a name: {_name_list(strangers)}; expected weights only."
        )
    return dict(content)


def read_gpt_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Autoregressive weights of any known layout, under the 410 names of the published file.

    Prefixes of DataParallel (`module.`) and torch.compile (`_orig_mod.`), attention buffers and the duplicates of
    tortoise-tts's generation wrapper are taken off; dtypes are left as they are. Names aren't checked yet, see
    `check_weights`.

    Raises: UserError: as `read_tensors`, and if two entries end up under one name.
    """
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(path).items():
        name = re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))
        if _ATTENTION_BUFFER.match(name) or _DUPLICATE.match(name):
            continue
        if name in weights:
            raise UserError(f"{path} holds {name} twice (as {key} and under another prefix); expected one of them.")
        weights[name] = tensor
    return weights


def config_from_weights(weights: Mapping[str, torch.Tensor], source: str | Path) -> GPTConfig:
    """Sizes of the model a bare state dict belongs to, read off its shapes.

    The number of attention heads isn't in the shapes. TorToiSe always uses 64 channels per head, which is assumed for
    widths from 512 up; smaller models need a config.json beside the file.

    Raises: UserError: if the tensors that tell the sizes are missing, or the width is below 512.
    """
    needed = ("text_embedding", "mel_embedding", "text_pos_embedding.emb", "mel_pos_embedding.emb")
    missing = [f"{name}.weight" for name in needed if f"{name}.weight" not in weights]
    layers = {int(match.group(1)) for key in weights if (match := re.match(r"^gpt\.h\.(\d+)\.", key))}
    if missing or not layers or any(weights[f"{name}.weight"].dim() != 2 for name in needed):
        raise UserError(
            f"{source} is not an autoregressive model of TorToiSe: "
            f"{_name_list(missing) if missing else 'gpt.h.*'} is missing. Its names begin with "
            f"{_name_list(sorted({key.split('.')[0] for key in weights}))}."
        )
    text_rows, width = weights["text_embedding.weight"].shape
    if width < 512 or width % _HEAD_SIZE:
        raise UserError(
            f"{source} is {width} wide, not a released size, and weights don't tell the number of attention heads; "
            f"put its config.json into the same folder."
        )
    conditioning_inputs = 2  # 604 + 2 + 2 rows in the released file
    return GPTConfig(
        num_layers=max(layers) + 1,
        hidden_size=width,
        num_heads=width // _HEAD_SIZE,
        num_text_tokens=text_rows - 1,
        max_text_tokens=weights["text_pos_embedding.emb.weight"].shape[0] - 2,
        num_mel_codes=weights["mel_embedding.weight"].shape[0] - 2,
        max_mel_tokens=weights["mel_pos_embedding.emb.weight"].shape[0] - 2 - conditioning_inputs,
        max_conditioning_inputs=conditioning_inputs,
    )


def check_weights(weights: Mapping[str, torch.Tensor], layout: Layout, source: str | Path) -> None:
    """Refuse weights that don't fill a model exactly.

    Raises: UserError: naming missing, unexpected and mis-shaped tensors, ones of a kind no TorToiSe file holds
        (integers, 8-bit floats, sparse ones), and ones with NaN or infinity.
    """
    problems = []
    missing = [key for key in layout if key not in weights]
    unexpected = [key for key in weights if key not in layout]
    shared = [key for key in layout if key in weights]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {layout[key][0]}"
        for key in shared
        if tuple(weights[key].shape) != layout[key][0]
    ]
    kinds = [
        f"{key} ({weights[key].dtype}, {weights[key].layout})"
        for key in shared
        if weights[key].dtype not in _WEIGHT_DTYPES or weights[key].layout != torch.strided
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            problems.append(f"{len(names)} {what}: {_name_list(names)}")
    if kinds:
        problems.append(f"{len(kinds)} not of 16 to 64 bits floating point: {_name_list(kinds)}")
    if not problems:
        broken = [key for key in shared if not bool(torch.isfinite(weights[key]).all())]
        if broken:
            problems.append(f"{len(broken)} with NaN or infinite values: {_name_list(broken)}")
    if problems:
        raise UserError(
            f"{source} doesn't fit the model ({len(layout)} tensors expected, {len(weights)} found). "
            + "; ".join(problems)
            + ". Nothing was loaded."
        )


def _name_list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def published_state_dict(
    weights: Mapping[str, torch.Tensor],
    config: GPTConfig,
    dtype: torch.dtype = torch.float32,
    attention_buffers: bool = True,
) -> dict[str, torch.Tensor]:
    """The weights as the published file holds them: that order, on the CPU, one dtype, attention buffers beside them.

    Tensors that already are on the CPU with this dtype are not copied.
    """
    layout = published_layout(config, attention_buffers, dtype)
    state_dict: dict[str, torch.Tensor] = {}
    for key, (shape, key_dtype) in layout.items():
        buffer = _ATTENTION_BUFFER.match(key)
        if buffer is None:
            state_dict[key] = weights[key].detach().to(device="cpu", dtype=key_dtype).contiguous()
        elif buffer.group(1) == "bias":
            state_dict[key] = torch.ones(shape[-2:], dtype=key_dtype).tril().view(shape)
        else:
            state_dict[key] = torch.tensor(_MASKED_BIAS, dtype=key_dtype)
    return state_dict


def write_published(state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a bare state dict as PyTorch file and wait until it is on the disk."""
    with open(path, "wb") as stream:
        torch.save(state_dict, stream)
        stream.flush()
        os.fsync(stream.fileno())
