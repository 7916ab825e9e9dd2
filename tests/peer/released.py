"""Our models as the files that TorToiSe's programs were published with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, UnivNetModel

NAMES = {
    "gpt": "autoregressive.pth",
    "clvp": "clvp2.pth",
    "diffusion": "diffusion_decoder.pth",
    "vocoder": "vocoder.pth",
}
"""Published files of the models."""


def write_released(name: str, model: PreTrainedModel, folder: Path) -> None:
    """Write a model as its published file: a bare state dict, but for the vocoder."""
    state = {"model_g": released_vocoder(model)} if name == "vocoder" else model.state_dict()
    torch.save(state, folder / NAMES[name])


def released_vocoder(vocoder: UnivNetModel) -> dict[str, torch.Tensor]:
    """transformers' names back to the released ones, with a weight norm that changes nothing."""
    state = {}
    for key, tensor in vocoder.state_dict().items():
        parts = key.split(".")
        if parts[0] == "resblocks":
            stack, rest = f"res_stack.{parts[1]}", parts[2:]
            if rest[0] == "resblocks":
                name = f"{stack}.conv_blocks.{rest[1]}.1"
            elif rest[0] == "convt_pre":
                name = f"{stack}.convt_pre.1"
            elif rest[1] == "resblocks":
                name = f"{stack}.kernel_predictor.residual_convs.{rest[2]}.{ {'conv1': 1, 'conv2': 3}[rest[3]] }"
            else:
                name = f"{stack}.kernel_predictor.{rest[1]}" + (".0" if rest[1] == "input_conv" else "")
        else:
            name = parts[0] + (".1" if parts[0] == "conv_post" else "")
        if parts[-1] == "weight":
            state[f"{name}.weight_v"] = tensor
            state[f"{name}.weight_g"] = tensor.flatten(1).norm(dim=1).view(-1, 1, 1)
        else:
            state[f"{name}.{parts[-1]}"] = tensor
    return state
