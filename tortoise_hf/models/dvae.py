"""The discrete VAE that turns a mel spectrogram into codes, one for four frames.

A run uses it as its base holds it; only `dvae_training.py` trains one.

Architecture and key names are those of the released ``dvae.pth``; with the default configuration every number below is
read off that file's shapes. Layout: two stride-2 convolutions and three residual blocks lead to ``codebook_dim``
channels, the nearest of ``num_codes`` codebook columns is the code; the decoder mirrors that.
"""

# B batch · F mel frames · C codes, ceil(ceil(F / 2) / 2)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

FRAMES_PER_CODE = 4


class DVAEConfig(PreTrainedConfig):
    """Sizes of the DVAE. The defaults are those of the released file.

    Args:
        num_mel_bins: mel bins of input and output.
        hidden_size: channels after the first convolution; doubled by each further one.
        codebook_dim: length of a codebook vector.
        num_codes: codebook vectors, that is possible codes.
        num_layers: stride-2 convolutions; a code stands for ``2 ** num_layers`` frames.
        num_resnet_blocks: residual blocks in the encoder and in the decoder.
        kernel_size: odd kernel size of all convolutions that aren't pointwise.
    """

    model_type = "tortoise_dvae"

    num_mel_bins: int = 80
    hidden_size: int = 512
    codebook_dim: int = 512
    num_codes: int = 8192
    num_layers: int = 2
    num_resnet_blocks: int = 3
    kernel_size: int = 3

    @property
    def reach(self) -> int:
        """Codes' worth of frames that a code sees to its left and right, at most."""
        return (2 * self.num_resnet_blocks + 2) * (self.kernel_size // 2)


class ResidualBlock(nn.Module):
    """Input plus two convolutions and a pointwise one, with ReLU between them; (B, channels, F) to the same."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2),
            nn.ReLU(),
            nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's output, of the input's shape."""
        return hidden + self.net(hidden)


class Upsample(nn.Module):
    """Repeat every frame twice, then a convolution; (B, in, F) to (B, out, 2F)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the upsampled frames."""
        return self.conv(nn.functional.interpolate(hidden, scale_factor=2, mode="nearest"))


class Codebook(nn.Module):
    """The code vectors, as columns, and the two averages of which training makes them (see `codebook.py`)."""

    def __init__(self, dim: int, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(dim, num_codes))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_avg", self.embed.clone())

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Index of the column with the smallest squared distance to each vector: (B, dim, C) to (B, C) int64.

        The lowest index wins a tie.
        """
        vectors = vectors.transpose(1, 2)
        distance = vectors.square().sum(-1, keepdim=True) - 2 * vectors @ self.embed + self.embed.square().sum(0)
        return distance.argmin(-1)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors of the codes: (B, C) to (B, dim, C)."""
        return nn.functional.embedding(codes, self.embed.T).transpose(1, 2)


class DVAE(PreTrainedModel):
    """Mel spectrogram to codes and back, without gradients and in full precision whatever the surroundings ask for."""

    config_class = DVAEConfig
    base_model_prefix = ""
    main_input_name = "mel"

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        kernel = config.kernel_size
        widths = [config.hidden_size * 2**layer for layer in range(config.num_layers)]

        encoder: list[nn.Module] = []
        for in_channels, out_channels in zip([config.num_mel_bins, *widths[:-1]], widths, strict=True):
            conv = nn.Conv1d(in_channels, out_channels, kernel, stride=2, padding=kernel // 2)
            encoder.append(nn.Sequential(conv, nn.ReLU()))
        encoder += [ResidualBlock(widths[-1], kernel) for _ in range(config.num_resnet_blocks)]
        encoder.append(nn.Conv1d(widths[-1], config.codebook_dim, 1))
        self.encoder = nn.Sequential(*encoder)

        self.codebook = Codebook(config.codebook_dim, config.num_codes)

        decoder: list[nn.Module] = [nn.Conv1d(config.codebook_dim, widths[-1], 1)]
        decoder += [ResidualBlock(widths[-1], kernel) for _ in range(config.num_resnet_blocks)]
        for in_channels, out_channels in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True):
            decoder.append(nn.Sequential(Upsample(in_channels, out_channels, kernel), nn.ReLU()))
        decoder.append(nn.Conv1d(widths[0], config.num_mel_bins, 1))
        self.decoder = nn.Sequential(*decoder)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):  # the library's fixed 0.02 would let the signal die within a few layers
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, Codebook):
            init.normal_(module.embed)
            init.zeros_(module.cluster_size)
            init.copy_(module.embed_avg, module.embed)

    @torch.no_grad()
    def encode(self, mel: torch.Tensor) -> torch.Tensor:
        """Codes of a normalised mel spectrogram.

        Args:
            mel: (B, num_mel_bins, F), ``audio.LogMel`` with the released norms.

        Returns: (B, C) int64 codes with C = ceil(ceil(F / 2) / 2).
        """
        with full_precision(mel.device):
            return self.codebook.nearest(self.encoder(mel.float()))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Mel spectrogram of codes: (B, C) to (B, num_mel_bins, 4C), normalised like the input of `encode`."""
        with full_precision(codes.device):
            return self.decoder(self.codebook.lookup(codes))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """The same as `encode`."""
        return self.encode(mel)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 on `device`: codes are cached, so they mustn't depend on how the run computes.

    TF32 is PyTorch's default for convolutions; it changes the nearest vector of some frames.
    """
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
