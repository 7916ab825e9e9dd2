"""The autoregressive model: text and a speaker's conditioning go in, logits over mel codes (and over text) come out.

One causal GPT-2 stack reads ``[conditioning vector][text row][mel row]``. Key names and constants are those of the
released ``autoregressive.pth``, so its tensors load without renaming; `GPTConfig`'s defaults are its sizes.
"""

# B batch · K conditioning clips · F mel frames · T text positions · C mel positions · L = 1 + T + C · D hidden size

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer


class GPTConfig(PreTrainedConfig):
    """Sizes of the model. The defaults are those of the released file.

    Ids follow from the counts: text ids are ``0 .. num_text_tokens - 1`` with 0 as STOP, then START; mel codes are
    ``0 .. num_mel_codes - 1``, then START, then STOP.

    Args:
        num_layers: GPT-2 blocks.
        hidden_size: width D; must divide by `num_heads`.
        num_heads: attention heads, in the GPT-2 blocks and in the conditioning encoder.
        num_text_tokens: size of the tokenizer's vocabulary.
        max_text_tokens: text ids a row may hold besides START and STOP.
        num_mel_codes: size of the DVAE's codebook.
        max_mel_tokens: mel codes a row may hold besides START and STOP.
        max_conditioning_inputs: only adds rows to the mel position table, as in the released file.
        num_mel_bins: mel bins of the conditioning clips.
        num_conditioning_layers: attention blocks of the conditioning encoder.
        dropout: probability of GPT-2's four dropouts: embeddings, attention weights, attention output, MLP output.
        initializer_range: standard deviation of fresh embeddings and linear weights; only matters from scratch.
    """

    model_type = "tortoise_gpt"
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}  # noqa: RUF012

    num_layers: int = 30
    hidden_size: int = 1024
    num_heads: int = 16
    num_text_tokens: int = 255
    max_text_tokens: int = 402
    num_mel_codes: int = 8192
    max_mel_tokens: int = 604
    max_conditioning_inputs: int = 2
    num_mel_bins: int = 80
    num_conditioning_layers: int = 6
    dropout: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must divide by num_heads {self.num_heads}")
        super().__post_init__(**kwargs)

    @property
    def stop_text_id(self) -> int:
        """Text id that ends a row; the tokenizer's ``[STOP]``."""
        return 0

    @property
    def start_text_id(self) -> int:
        """Text id that opens a row; one past the tokenizer's vocabulary."""
        return self.num_text_tokens

    @property
    def start_mel_id(self) -> int:
        """Mel id that opens a row."""
        return self.num_mel_codes

    @property
    def stop_mel_id(self) -> int:
        """Mel id that ends a row."""
        return self.num_mel_codes + 1

    @property
    def text_vocabulary(self) -> int:
        """Rows of the text embedding and of the text head."""
        return self.num_text_tokens + 1

    @property
    def mel_vocabulary(self) -> int:
        """Rows of the mel embedding and of the mel head."""
        return self.num_mel_codes + 2

    @property
    def text_positions(self) -> int:
        """Longest text row, START and STOP included."""
        return self.max_text_tokens + 2

    @property
    def mel_positions(self) -> int:
        """Rows of the mel position table."""
        return self.max_mel_tokens + 2 + self.max_conditioning_inputs


class GPTOutput(NamedTuple):
    """What `TortoiseGPT` returns. Entry i of a row is the state after reading input i, so it predicts input i + 1."""

    text_logits: torch.Tensor
    """(B, T, text_vocabulary) before softmax."""
    mel_logits: torch.Tensor
    """(B, C, mel_vocabulary) before softmax."""
    latents: torch.Tensor
    """(B, C, D) output of `final_norm` on the mel row; what the diffusion model reads."""


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 whatever the precision of its input and weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalised hidden states, in the input's precision."""
        normed = nn.functional.group_norm(
            hidden.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(hidden.dtype)


def num_norm_groups(channels: int) -> int:
    """Groups TorToiSe uses for so many channels: 32, fewer for narrow layers, halved until they divide."""
    groups = 8 if channels <= 16 else 16 if channels <= 64 else 32
    while channels % groups:
        groups //= 2
    return groups


class ConditioningAttention(GradientCheckpointingLayer):
    """Full self-attention over the frames of a conditioning clip; (N, D, F) to the same."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(num_norm_groups(channels), channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, hidden: torch.Tensor, num_answers: int | None = None) -> torch.Tensor:
        """Return ``hidden + attention``: the residual is the input as it came, not its normalised form.

        With `num_answers` only that many frames are answered for, the first ones: (N, D, num_answers).
        """
        clips, channels, frames = hidden.shape
        # The channels are split into heads first and into query, key, value inside each head.
        heads = self.qkv(self.norm(hidden)).view(clips, self.num_heads, 3, channels // self.num_heads, frames)
        query, key, value = heads.transpose(3, 4).unbind(2)
        # Its kernels take the softmax in float32; the default scale equals TorToiSe's head ** -0.25 on both sides.
        attended = nn.functional.scaled_dot_product_attention(query[:, :, :num_answers], key, value)
        attended = attended.transpose(2, 3).reshape(clips, channels, -1)
        return hidden[:, :, :num_answers] + self.proj_out(attended)


class ConditioningEncoder(nn.Module):
    """Mel spectrogram of one clip to the vector that tells the GPT who speaks: (N, bins, F) to (N, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.init = nn.Conv1d(config.num_mel_bins, config.hidden_size, 1)
        blocks = (
            ConditioningAttention(config.hidden_size, config.num_heads) for _ in range(config.num_conditioning_layers)
        )
        self.attn = nn.Sequential(*blocks)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Return the state of the first frame, which has attended to all others."""
        *blocks, last = self.attn
        hidden = self.init(mel)
        for block in blocks:
            hidden = block(hidden)
        return last(hidden, num_answers=1)[:, :, 0]


class LearnedPositions(nn.Module):
    """A learned vector for each position of a row, counted from 0."""

    def __init__(self, num_positions: int, hidden_size: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_positions, hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (length, D) for ids (B, length)."""
        return self.emb(torch.arange(ids.shape[1], device=ids.device))


class NoPositions(nn.Module):
    """Stands in for GPT-2's own position table: the rows bring their positions with them."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return a zero that takes the precision of whatever it's added to."""
        return position_ids.new_zeros(())


class GPT2Stack(GPT2Model):
    """transformers' GPT-2 without its token and position tables; it only takes ``inputs_embeds``."""

    # Copies of the causal mask that old transformers versions stored in every block of the released file.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(bias|masked_bias)$"]  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        gpt2_config = GPT2Config(
            vocab_size=1,
            n_positions=1,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            # GPT-2's own approximation in one kernel; "gelu_new" is the same formula in eight.
            activation_function="gelu_pytorch_tanh",
            initializer_range=config.initializer_range,
            bos_token_id=None,  # it has no vocabulary of its own
            eos_token_id=None,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation=config._attn_implementation,
        )
        super().__init__(gpt2_config)
        del self.wte, self.wpe
        self.wpe = NoPositions()

    def get_input_embeddings(self) -> None:
        """There are none; transformers asks before it switches gradient checkpointing on."""
        return None


class TortoiseGPT(PreTrainedModel):
    """TorToiSe's autoregressive model; the one that is trained."""

    config_class = GPTConfig
    base_model_prefix = ""
    main_input_name = "text_inputs"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["GPT2Block", "ConditioningAttention"]  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.conditioning_encoder = ConditioningEncoder(config)
        self.text_embedding = nn.Embedding(config.text_vocabulary, width)
        self.mel_embedding = nn.Embedding(config.mel_vocabulary, width)
        self.gpt = GPT2Stack(config)
        self.mel_pos_embedding = LearnedPositions(config.mel_positions, width)
        self.text_pos_embedding = LearnedPositions(config.text_positions, width)
        self.final_norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocabulary)
        self.mel_head = nn.Linear(width, config.mel_vocabulary)
        self.post_init()
        self._init_residual_outputs()

    def get_input_embeddings(self) -> nn.Embedding:
        """The text embedding."""
        return self.text_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):  # pointwise, in the conditioning encoder
            init.normal_(module.weight, std=module.in_channels**-0.5)

    @torch.no_grad()
    def _init_residual_outputs(self) -> None:
        """What `post_init` leaves out, because it passes over modules without parameters of their own."""
        for block in self.conditioning_encoder.attn:  # a fresh block adds nothing
            init.zeros_(block.proj_out.weight)
        for block in self.gpt.h:  # GPT-2's scheme: two residual additions in each block
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                init.normal_(projection.weight, std=self.config.initializer_range / (2 * self.config.num_layers) ** 0.5)

    def encode_conditioning(self, conditioning_mel: torch.Tensor) -> torch.Tensor:
        """Encode the clips of each speaker and average over them.

        Args:
            conditioning_mel: (B, K, num_mel_bins, F) normalised mels of K clips, or (B, num_mel_bins, F) of one.

        Returns: (B, D) conditioning latent.
        """
        if conditioning_mel.dim() == 3:
            conditioning_mel = conditioning_mel.unsqueeze(1)
        batch, clips = conditioning_mel.shape[:2]
        return self.conditioning_encoder(conditioning_mel.flatten(0, 1)).view(batch, clips, -1).mean(1)

    def forward(
        self,
        text_inputs: torch.Tensor,
        mel_inputs: torch.Tensor,
        conditioning_mel: torch.Tensor | None = None,
        conditioning_latent: torch.Tensor | None = None,
        conditioning_rows: torch.Tensor | None = None,
        text_lengths: torch.Tensor | None = None,
        num_positions: int | None = None,
    ) -> GPTOutput:
        """Logits of every text and mel position.

        With `text_lengths` a row's mel part follows its last real text position and its text padding moves behind the
        mel part, where causal attention keeps it out of sight. A row's real positions then depend neither on how far it
        was padded nor on its neighbours in the batch. Mel padding is behind everything real anyway.

        Args:
            text_inputs: (B, T) ids, START and STOP included; nothing is added to them.
            mel_inputs: (B, C) ids, START included, and STOP where there is to be one.
            conditioning_mel: (B, K, num_mel_bins, F) or (B, num_mel_bins, F); or else give `conditioning_latent`.
            conditioning_latent: (B, D) from `encode_conditioning`, or (1, D) for all rows.
            conditioning_rows: (B,) which of N conditionings each row hears, each of which is encoded once; None: row i
                hears the i-th.
            text_lengths: (B,) real positions of each text row, between 1 and T; None means all T, the released layout.
            num_positions: with `text_lengths`, positions of the longest row in that layout (conditioning vector, text
                and mel part); what lies behind them is padding in every row and is not computed. None: all 1 + T + C.

        Returns: GPTOutput; at padded positions its values mean nothing.
        Raises: ValueError: if a row is longer than its position table, or not exactly one conditioning is given.
        """
        if (conditioning_mel is None) == (conditioning_latent is None):
            raise ValueError("give either conditioning_mel or conditioning_latent, and not both")
        if text_inputs.shape[1] > self.config.text_positions:
            raise ValueError(f"a text row has {text_inputs.shape[1]} positions, of {self.config.text_positions}")
        if mel_inputs.shape[1] > self.config.mel_positions:
            raise ValueError(f"a mel row has {mel_inputs.shape[1]} positions, of {self.config.mel_positions}")

        if conditioning_latent is None:
            conditioning_latent = self.encode_conditioning(conditioning_mel)
        if conditioning_rows is not None:
            conditioning_latent = conditioning_latent[conditioning_rows]
        text = self.text_embedding(text_inputs) + self.text_pos_embedding(text_inputs)
        mel = self.mel_embedding(mel_inputs) + self.mel_pos_embedding(mel_inputs)
        conditioning = conditioning_latent.to(text.dtype).expand(text.shape[0], -1).unsqueeze(1)
        rows = torch.cat([conditioning, text, mel], dim=1)

        if text_lengths is not None:
            order, inverse = compact_order(text_lengths, text_inputs.shape[1], mel_inputs.shape[1])
            if num_positions is not None:
                # Padded places past the cut read the last position instead; nobody looks at them.
                order, inverse = order[:, :num_positions], inverse.clamp(max=num_positions - 1)
            rows = take_positions(rows, order)
        hidden = self.gpt(inputs_embeds=rows, use_cache=False).last_hidden_state
        if text_lengths is not None:
            hidden = take_positions(hidden, inverse)

        hidden = self.final_norm(hidden[:, 1:])
        text_hidden, latents = hidden.split([text_inputs.shape[1], mel_inputs.shape[1]], dim=1)
        return GPTOutput(self.text_head(text_hidden), self.mel_head(latents), latents)

    def latents(
        self, text_ids: torch.Tensor, mel_codes: torch.Tensor, conditioning_latent: torch.Tensor
    ) -> torch.Tensor:
        """States that predict finished codes, as the diffusion model takes them.

        Args:
            text_ids: (B, n) or (1, n) ids; START and STOP are added. TorToiSe's own ids already end in one STOP here.
            mel_codes: (B, m) codes without START and STOP.
            conditioning_latent: (B, D) or (1, D).

        Returns: (B, m, D); entry i is the state that predicts code i.
        """
        text_ids = text_ids.expand(mel_codes.shape[0], -1)
        pad = nn.functional.pad
        text_inputs = pad(
            pad(text_ids, (1, 0), value=self.config.start_text_id), (0, 1), value=self.config.stop_text_id
        )
        mel_inputs = pad(pad(mel_codes, (1, 0), value=self.config.start_mel_id), (0, 1), value=self.config.stop_mel_id)
        output = self(text_inputs, mel_inputs, conditioning_latent=conditioning_latent)
        return output.latents[:, : mel_codes.shape[1]]


def compact_order(text_lengths: torch.Tensor, text_size: int, mel_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How the padding of ``[conditioning][text][mel]`` rows moves from behind the text to behind the mel part.

    Args:
        text_lengths: (B,) real text positions of each row.
        text_size: T.
        mel_size: C.

    Returns: two (B, L) permutations: the padded index of each compact position, and the reverse.
    """
    lengths = text_lengths.unsqueeze(1)
    position = torch.arange(1 + text_size + mel_size, device=text_lengths.device).unsqueeze(0)
    padding = text_size - lengths
    order = torch.where(position <= lengths, position, position + padding)
    order = torch.where(position > lengths + mel_size, position - mel_size, order)
    inverse = torch.where(position <= lengths, position, position + mel_size)
    inverse = torch.where(position > text_size, position - padding, inverse)
    return order, inverse


def take_positions(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row-wise selection: (B, L, D) and (B, L) indices to (B, L, D)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
