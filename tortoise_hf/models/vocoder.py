"""The vocoder, log-mel spectrogram at 24,000 Hz to waveform: transformers' UnivNet, with the released names mapped.

The released ``vocoder.pth`` holds weight-normalised convolutions under other names; both are resolved when it is read.
"""

# B batch · F mel frames · S = 256 F samples

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from transformers import UnivNetConfig, UnivNetModel

from tortoise_hf.audio import HOP_LENGTH, LOG_FLOOR

EXTRA_FRAMES = 10
"""Silent frames put behind a mel and cut off again, so that its end isn't next to the network's padding."""
RELEASED_VOCODER = UnivNetConfig()
"""transformers' defaults are the sizes of the released file."""

# Released name -> transformers' name.
_RENAMED = (
    (r"^res_stack\.(\d+)\.conv_blocks\.(\d+)\.1\.", r"resblocks.\1.resblocks.\2.conv."),
    (r"^res_stack\.(\d+)\.convt_pre\.1\.", r"resblocks.\1.convt_pre."),
    (r"^res_stack\.(\d+)\.kernel_predictor\.input_conv\.0\.", r"resblocks.\1.kernel_predictor.input_conv."),
    (
        r"^res_stack\.(\d+)\.kernel_predictor\.residual_convs\.(\d+)\.1\.",
        r"resblocks.\1.kernel_predictor.resblocks.\2.conv1.",
    ),
    (
        r"^res_stack\.(\d+)\.kernel_predictor\.residual_convs\.(\d+)\.3\.",
        r"resblocks.\1.kernel_predictor.resblocks.\2.conv2.",
    ),
    (r"^res_stack\.(\d+)\.kernel_predictor\.", r"resblocks.\1.kernel_predictor."),
    (r"^conv_post\.1\.", "conv_post."),
)


def convert_vocoder_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a released or folded UnivNet file under transformers' names, weight normalisation folded in.

    Args:
        weights: under the released names, with `weight_g` and `weight_v` or with plain weights; names that are
            transformers' already stay as they are.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        if key.endswith(".weight_g"):
            continue
        if key.endswith(".weight_v"):
            scale = weights.get(key[:-1] + "g")
            if scale is not None:
                # One norm per index of the first axis, which is the input channel in transposed convolutions.
                tensor = scale * tensor / tensor.flatten(1).norm(dim=1).view(-1, 1, 1)
                key = key[:-2]
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        converted[key] = tensor
    return converted


@torch.no_grad()
def vocode(
    vocoder: UnivNetModel,
    mel: torch.Tensor,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Waveform of a log-mel spectrogram.

    Args:
        vocoder: the model.
        mel: (B, 100, F) log-mel as `audio.LogMel24k` makes it, not normalised.
        noise: (B, noise channels, F + 10) standard normal; None draws it.
        generator: draws the noise on the CPU, so that a seed means the same on every device.

    Returns: (B, 256 F) float32 samples at 24,000 Hz in [-1, 1].
    """
    mel = torch.nn.functional.pad(mel, (0, EXTRA_FRAMES), value=math.log(LOG_FLOOR))
    if noise is None:
        noise = torch.randn(mel.shape[0], vocoder.config.model_in_channels, mel.shape[2], generator=generator)
    dtype = vocoder.conv_pre.weight.dtype
    features = mel.to(dtype).transpose(1, 2)
    output = vocoder(features, noise_sequence=noise.to(mel.device, dtype).transpose(1, 2), return_dict=True)
    return output.waveforms[:, : -EXTRA_FRAMES * HOP_LENGTH].float().clamp(-1, 1)
