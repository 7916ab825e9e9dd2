"""Operations of the GPT by formula: what a training step needs, whatever is padded, recomputed or masked besides.

A multiplication and an addition are two operations. Norms, activations, softmax and embeddings are left out: they are
no matrix products. A backward pass takes twice what the forward pass does.
"""

# L positions of a row · D hidden size · F mel frames of a conditioning window

from __future__ import annotations

from tortoise_hf.models.dvae import FRAMES_PER_CODE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig

FORWARD_AND_BACKWARD = 3


def stack(config: GPTConfig, positions: int) -> int:
    """Forward pass of the GPT-2 blocks over one row of L positions; every position attends to those up to itself."""
    width = config.hidden_size
    matrices = 2 * 12 * width**2 * positions  # 3 for query, key, value, 1 for the output, 8 for the two of the MLP
    attention = 2 * 2 * width * positions * (positions + 1) // 2
    return config.num_layers * (matrices + attention)


def heads(config: GPTConfig, text_targets: int, mel_targets: int) -> int:
    """Forward pass of both heads over so many positions."""
    return 2 * config.hidden_size * (config.text_vocabulary * text_targets + config.mel_vocabulary * mel_targets)


def conditioning(config: GPTConfig, frames: int) -> int:
    """Forward pass of the conditioning encoder over one window, of whose last block one frame is asked for."""
    width, layers = config.hidden_size, config.num_conditioning_layers
    first = 2 * config.num_mel_bins * width * frames
    whole = 2 * 4 * width**2 * frames + 4 * width * frames**2
    last = 2 * width**2 * (3 * frames + 1) + 4 * width * frames
    return first + (layers - 1) * whole + last


def training(config: GPTConfig, rows: list[tuple[int, int]], windows: list[int]) -> int:
    """Forward and backward pass over rows.

    Args:
        config: of the GPT.
        rows: text and mel targets of each; a row is as long as both and the conditioning vector.
        windows: frames of each conditioning window, all rows together, but for silence that repeats itself.
    """
    forward = sum(stack(config, 1 + text + mel) + heads(config, text, mel) for text, mel in rows)
    return FORWARD_AND_BACKWARD * (forward + sum(conditioning(config, frames) for frames in windows))


def dvae_encoding(config: DVAEConfig, num_codes: int) -> int:
    """Encoder and nearest code of so many codes."""
    kernel, total, width = config.kernel_size, 0, config.num_mel_bins
    for layer in range(config.num_layers):
        out = config.hidden_size * 2**layer
        total += width * out * kernel * FRAMES_PER_CODE // 2 ** (layer + 1)
        width = out
    total += config.num_resnet_blocks * (2 * kernel + 1) * width**2
    total += width * config.codebook_dim + config.codebook_dim * config.num_codes
    return 2 * total * num_codes
