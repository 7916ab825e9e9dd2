"""The diffusion decoder: the GPT's latents to a 24,000 Hz mel spectrogram, one denoising step per call.

Key names and constants are those of the released ``diffusion_decoder.pth``. The schedule and the loops that call the
network are in `tortoise_hf.samplers`.
"""

# B batch · K conditioning clips · F mel frames · C mel codes · D hidden size

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from tortoise_hf.models.conditioning import FrameAttention, GroupNorm32, num_norm_groups

NUM_TIMESTEPS = 4000
"""Noise levels the network was trained on, 0 the cleanest."""
NUM_BUCKETS = 32
"""Relative positions the attention tells apart; half for either direction."""
MAX_DISTANCE = 64
"""Frames from which on all distances share a bucket."""


class DiffusionConfig(PreTrainedConfig):
    """Sizes of the model. The defaults are those of the released file.

    Args:
        hidden_size: width D.
        num_layers: residual-and-attention layers; three residual blocks follow them.
        num_heads: attention heads of every attention block.
        num_mel_bins: mel bins in; twice as many come out, noise and variance.
        latent_size: width of the GPT's latents.
        num_mel_codes: rows of the code embedding, for decoding from codes instead of latents.
    """

    model_type = "tortoise_diffusion"

    hidden_size: int = 1024
    num_layers: int = 10
    num_heads: int = 16
    num_mel_bins: int = 100
    latent_size: int = 1024
    num_mel_codes: int = 8193


class RelativePositions(nn.Module):
    """What the distance between two frames adds to their attention score, learned per bucket of distances and head."""

    def __init__(self, num_heads: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.relative_attention_bias = nn.Embedding(NUM_BUCKETS, num_heads)

    def forward(self, frames: int) -> torch.Tensor:
        """(heads, frames, frames), query by key."""
        device = self.relative_attention_bias.weight.device
        distances = torch.arange(1 - frames, frames, device=device)  # key minus query
        by_distance = self.relative_attention_bias(distance_bucket(distances)).T * self.scale
        # Every row is the one below it, shifted by one: windows over the distances, last query first.
        return by_distance.unfold(1, frames, 1).flip(1)


class AttentionBlock(FrameAttention):
    """Full self-attention over frames with a bias by distance; (B, D, F) to the same."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__(channels, num_heads)
        self.relative_pos_embeddings = RelativePositions(num_heads, scale=(channels // num_heads) ** 0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``hidden + attention``."""
        query, key, value = self.heads(hidden)
        bias = self.relative_pos_embeddings(hidden.shape[2]).to(query.dtype)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0))
        return hidden + self.project(attended)


class ResidualBlock(nn.Module):
    """Two convolutions whose middle norm is scaled and shifted by the noise level; (B, D, F) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = num_norm_groups(channels)
        self.in_layers = nn.Sequential(GroupNorm32(groups, channels), nn.SiLU(), nn.Conv1d(channels, channels, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))
        # Where the file numbers a dropout, which speaking doesn't have.
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, channels), nn.SiLU(), nn.Identity(), nn.Conv1d(channels, channels, 3, padding=1)
        )

    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the block's output; `time` is (B, D)."""
        scale, shift = self.emb_layers(time).unsqueeze(-1).chunk(2, dim=1)
        norm, *rest = self.out_layers
        change = norm(self.in_layers(hidden)) * (1 + scale) + shift
        for layer in rest:
            change = layer(change)
        return hidden + change


class DiffusionLayer(nn.Module):
    """A residual block, then an attention block."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.resblk = ResidualBlock(channels)
        self.attn = AttentionBlock(channels, num_heads)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, D, F) to the same; `time` is (B, D)."""
        return self.attn(self.resblk(hidden, time))


class DiffusionDecoder(PreTrainedModel):
    """Predicts the noise in a noisy mel spectrogram, and how much of it the next step should put back."""

    config_class = DiffusionConfig
    base_model_prefix = ""
    main_input_name = "mel"

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        width, heads, bins = config.hidden_size, config.num_heads, config.num_mel_bins
        self.inp_block = nn.Conv1d(bins, width, 3, padding=1)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.code_embedding = nn.Embedding(config.num_mel_codes, width)
        self.code_converter = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(3)))
        self.code_norm = GroupNorm32(num_norm_groups(width), width)
        self.latent_conditioner = nn.Sequential(
            nn.Conv1d(config.latent_size, width, 3, padding=1), *(AttentionBlock(width, heads) for _ in range(4))
        )
        self.contextual_embedder = nn.Sequential(
            nn.Conv1d(bins, width, 3, stride=2, padding=1),
            nn.Conv1d(width, 2 * width, 3, stride=2, padding=1),
            *(AttentionBlock(2 * width, heads) for _ in range(5)),
        )
        self.unconditioned_embedding = nn.Parameter(torch.randn(1, width, 1))
        self.conditioning_timestep_integrator = nn.ModuleList(DiffusionLayer(width, heads) for _ in range(3))
        self.integrating_conv = nn.Conv1d(2 * width, width, 1)
        self.mel_head = nn.Conv1d(width, bins, 3, padding=1)  # of training's auxiliary loss; in the file, never called
        layers: list[nn.Module] = [DiffusionLayer(width, heads) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers + [ResidualBlock(width) for _ in range(3)])
        self.out = nn.Sequential(
            GroupNorm32(num_norm_groups(width), width), nn.SiLU(), nn.Conv1d(width, 2 * bins, 3, padding=1)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.normal_(module.weight, std=(module.in_channels * module.kernel_size[0]) ** -0.5)
        elif isinstance(module, DiffusionDecoder):
            init.normal_(module.unconditioned_embedding)

    def encode_conditioning(self, conditioning_mel: torch.Tensor) -> torch.Tensor:
        """What the network is told of a speaker.

        Args:
            conditioning_mel: (B, K, num_mel_bins, F) log-mels of K clips by `audio.LogMel24k`, or (B, num_mel_bins, F).

        Returns: (B, 2 D), the mean over time and clips.
        """
        if conditioning_mel.dim() == 3:
            conditioning_mel = conditioning_mel.unsqueeze(1)
        batch, clips = conditioning_mel.shape[:2]
        embedded = self.contextual_embedder(conditioning_mel.flatten(0, 1))
        return embedded.view(batch, clips, *embedded.shape[1:]).mean((1, 3))

    def prepare(self, latents: torch.Tensor, conditioning_latent: torch.Tensor, num_frames: int) -> torch.Tensor:
        """The part of the conditioning that all steps share.

        Args:
            latents: (B, C, latent_size) of the GPT, or (B, C) int64 codes.
            conditioning_latent: (B, 2 D) from `encode_conditioning`.
            num_frames: length of the mel to be made.

        Returns: (B, D, num_frames).
        """
        if latents.is_floating_point():
            hidden = self.latent_conditioner(latents.transpose(1, 2))
        else:
            hidden = self.code_converter(self.code_embedding(latents).transpose(1, 2))
        scale, shift = conditioning_latent.unsqueeze(-1).chunk(2, dim=1)
        hidden = self.code_norm(hidden) * (1 + scale) + shift
        return nn.functional.interpolate(hidden, size=num_frames, mode="nearest")

    def unconditioned(self, conditioning: torch.Tensor) -> torch.Tensor:
        """What stands for "no conditioning", in the shape of `prepare`'s result."""
        return self.unconditioned_embedding.expand_as(conditioning)

    def forward(self, mel: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """One look at a noisy mel.

        Args:
            mel: (B, num_mel_bins, F) normalised mel with noise.
            timesteps: (B,) noise level, 0 to 3,999.
            conditioning: (B, D, F) from `prepare` or `unconditioned`.

        Returns: (B, 2 num_mel_bins, F) float32: the noise, then the variance's place between its bounds, -1 to 1.
        """
        dtype = self.inp_block.weight.dtype
        time = self.time_embed(timestep_embedding(timesteps, self.config.hidden_size).to(dtype))
        for layer in self.conditioning_timestep_integrator:
            conditioning = layer(conditioning, time)
        hidden = self.integrating_conv(torch.cat([self.inp_block(mel.to(dtype)), conditioning], dim=1))
        for layer in self.layers:
            hidden = layer(hidden, time)
        return self.out(hidden).float()


def timestep_embedding(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """(B,) noise levels to (B, width) float32: cosines, then sines, of frequencies from 1 down to 1/10,000."""
    half = width // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / half
    # Correctly rounded, whatever the device: at level 3,999 the last bit of a frequency shows in the result.
    frequencies = exponents.double().exp().float().to(timesteps.device)
    angles = timesteps.float().unsqueeze(1) * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


def distance_bucket(distances: torch.Tensor) -> torch.Tensor:
    """Bucket of each distance (key minus query, in frames): exact up to 7, then ever coarser, T5's scheme."""
    half = NUM_BUCKETS // 2
    exact = half // 2
    size = distances.abs()
    coarse = exact + (size.float().clamp(min=1) / exact).log() / math.log(MAX_DISTANCE / exact) * (half - exact)
    return (distances > 0) * half + torch.where(size < exact, size, coarse.long().clamp(max=half - 1))
