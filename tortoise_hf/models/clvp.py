"""CLVP: how well a row of mel codes fits a text. Of many sampled rows the best-scoring one is spoken.

Two transformer encoders, one for text and one for codes, end in one vector each; the score is their scaled cosine. Key
names and constants are those of the released ``clvp2.pth``.
"""

# B batch · T text ids · C mel codes · D hidden size

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

HEAD_SIZE = 64
"""Channels of an attention head, whatever the width. Source: x-transformers' default, the released shapes."""
ROTARY_SIZE = 32
"""Channels of each head that are rotated by the position, of queries, keys and values."""


class CLVPConfig(PreTrainedConfig):
    """Sizes of the model. The defaults are those of the released file.

    Args:
        hidden_size: width D of both encoders and of the vectors they end in.
        num_layers: attention blocks of each encoder, each followed by a feed-forward block.
        num_heads: attention heads of 64 channels.
        num_text_tokens: rows of the text embedding.
        num_mel_codes: rows of the code embedding; neither START nor STOP has one.
    """

    model_type = "tortoise_clvp"

    hidden_size: int = 768
    num_layers: int = 20
    num_heads: int = 12
    num_text_tokens: int = 256
    num_mel_codes: int = 8192


class ScaleNorm(nn.Module):
    """RMS norm without a bias, its lower bound on the norm itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalised hidden states, computed in float32."""
        values = hidden.float()
        norm = values.norm(dim=-1, keepdim=True) * values.shape[-1] ** -0.5
        return (values / norm.clamp(min=1e-8)).to(hidden.dtype) * self.g


class Attention(nn.Module):
    """Full self-attention with rotary positions; (B, length, D) to the same."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * HEAD_SIZE
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Return what is to be added to the hidden states; `angles` is (length, 32)."""
        batch, length, _ = hidden.shape
        query, key, value = (
            rotate(project(hidden).view(batch, length, self.num_heads, HEAD_SIZE).transpose(1, 2), angles)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).reshape(batch, length, -1))


class GatedProjection(nn.Module):
    """Linear layer of two halves, the first multiplied by the GELU of the second."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, width) to (…, inner)."""
        value, gate = self.proj(hidden).chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward block; (…, D) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.net = nn.Sequential(
            GatedProjection(width, inner), nn.Identity(), nn.Identity(), nn.Linear(inner, width)
        )  # the file numbers a norm and a dropout that are never there

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Return what is to be added to the hidden states; positions don't matter here."""
        return self.net(hidden)


class Wrapped(nn.Module):
    """A block under the name `wrap`, as the released keys have it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.wrap = block


class RotaryAngles(nn.Module):
    """Rotation angle of each position and channel pair."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", _rotary_frequencies())

    def forward(self, length: int) -> torch.Tensor:
        """(length, 32) angles in float32: each frequency twice, once for either half of the rotated channels."""
        positions = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        # Half precision would round the stored frequencies.
        stored = self.inv_freq.dtype == torch.float32
        angles = torch.outer(positions, self.inv_freq if stored else _rotary_frequencies().to(positions.device))
        return torch.cat([angles, angles], dim=-1)


class Blocks(nn.Module):
    """Pre-norm attention and feed-forward blocks by turns."""

    def __init__(self, config: CLVPConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.ModuleList([ScaleNorm(width)]), Wrapped(block)])
            for _ in range(config.num_layers)
            for block in (Attention(width, config.num_heads), FeedForward(width))
        )
        self.rotary_pos_emb = RotaryAngles()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, length, D) to the same."""
        angles = self.rotary_pos_emb(hidden.shape[1])
        for norms, block in self.layers:
            hidden = hidden + block.wrap(norms[0](hidden), angles)
        return hidden


class Transformer(nn.Module):
    """The blocks and a final layer norm."""

    def __init__(self, config: CLVPConfig) -> None:
        super().__init__()
        self.attn_layers = Blocks(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, length, D) to the same."""
        return self.norm(self.attn_layers(hidden))


class Encoder(nn.Module):
    """A transformer under the name `transformer`, as the released keys have it."""

    def __init__(self, config: CLVPConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, length, D) to (B, D), the mean over all positions: there is no mask."""
        return self.transformer(hidden).mean(1)


class CLVP(PreTrainedModel):
    """Scores rows of mel codes against a text."""

    config_class = CLVPConfig
    base_model_prefix = ""
    main_input_name = "text_ids"

    def __init__(self, config: CLVPConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.text_emb = nn.Embedding(config.num_text_tokens, width)
        self.to_text_latent = nn.Linear(width, width, bias=False)
        self.speech_emb = nn.Embedding(config.num_mel_codes, width)
        self.to_speech_latent = nn.Linear(width, width, bias=False)
        self.text_transformer = Encoder(config)
        self.speech_transformer = Encoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryAngles):
            init.copy_(module.inv_freq, _rotary_frequencies())
        elif isinstance(module, ScaleNorm):
            init.ones_(module.g)

    def encode_text(self, text_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids to (B, D) vectors of length 1."""
        return nn.functional.normalize(
            self.to_text_latent(self.text_transformer(self.text_emb(text_ids))).float(), dim=-1
        )

    def encode_codes(self, mel_codes: torch.Tensor) -> torch.Tensor:
        """(B, C) codes to (B, D) vectors of length 1."""
        hidden = self.speech_transformer(self.speech_emb(mel_codes))
        return nn.functional.normalize(self.to_speech_latent(hidden).float(), dim=-1)

    def forward(self, text_ids: torch.Tensor, mel_codes: torch.Tensor) -> torch.Tensor:
        """Score of each row of codes; the higher, the better it fits.

        Args:
            text_ids: (B, T), or (1, T) for all rows, which is then encoded once.
            mel_codes: (B, C) cleaned rows, all of one length: every position counts, padding too.

        Returns: (B,) float32.
        """
        cosine = (self.encode_text(text_ids) * self.encode_codes(mel_codes)).sum(-1)
        return cosine * self.temperature.float().exp()


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the first channels of (…, length, 64) by their position's angles, (length, 32)."""
    turned, rest = heads[..., :ROTARY_SIZE], heads[..., ROTARY_SIZE:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


def _rotary_frequencies() -> torch.Tensor:
    return 10_000.0 ** -(torch.arange(0, ROTARY_SIZE, 2).float() / ROTARY_SIZE)
