"""The autoregressive model: text and a speaker's conditioning go in, logits over mel codes (and over text) come out.

One causal GPT-2 stack reads ``[conditioning vector][text row][mel row]``. Key names and constants are those of the
released ``autoregressive.pth``, so its tensors load without renaming; `GPTConfig`'s defaults are its sizes. In training
the rows of a micro-batch stand one behind the other (see data/packing.py), and each attends to itself alone.
"""

# B batch · K conditioning clips · F mel frames · T text positions · C mel positions · D hidden size
# N real positions of all rows of a packed micro-batch

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from tortoise_hf.data.packing import Packing
from tortoise_hf.models.attention import PACKED_SDPA
from tortoise_hf.models.conditioning import ConditioningEncoder
from tortoise_hf.models.cross_entropy import sum_cross_entropy
from tortoise_hf.models.dropout import Dropout


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
    """What `TortoiseGPT` makes of rows. Entry i of a row is the state after input i, so it predicts input i + 1."""

    text_logits: torch.Tensor
    """(B, T, text_vocabulary) before softmax."""
    mel_logits: torch.Tensor
    """(B, C, mel_vocabulary) before softmax."""
    latents: torch.Tensor
    """(B, C, D) output of `final_norm` on the mel row; what the diffusion model reads."""


class GPTLosses(NamedTuple):
    """Cross-entropy of a packed micro-batch, summed over the targets that count; float64 scalars in nats."""

    text: torch.Tensor
    mel: torch.Tensor


class LearnedPositions(nn.Module):
    """A learned vector for each position of a row, counted from 0; `emb` gives those of single positions."""

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
        self.drop = Dropout(config.dropout)
        for block in self.h:
            block.attn.resid_dropout = Dropout(config.dropout)
            block.mlp.dropout = Dropout(config.dropout)

    def get_input_embeddings(self) -> None:
        """There are none; transformers asks before it switches gradient checkpointing on."""
        return None

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """What transformers would take, but for its "sdpa" the one that knows packed rows as well."""
        found = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return PACKED_SDPA if found == "sdpa" else found


class TortoiseGPT(PreTrainedModel):
    """TorToiSe's autoregressive model; the one that is trained."""

    config_class = GPTConfig
    base_model_prefix = ""
    main_input_name = "text_inputs"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["GPT2Block", "ConditioningAttention"]  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.conditioning_encoder = ConditioningEncoder(
            config.num_mel_bins, config.hidden_size, config.num_heads, config.num_conditioning_layers
        )
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
        packing: Packing | None = None,
        text_targets: torch.Tensor | None = None,
        mel_targets: torch.Tensor | None = None,
    ) -> GPTOutput | GPTLosses:
        """Logits of every text and mel position, or, of a packed micro-batch, the losses that it trains with.

        With `packing` a row's mel part follows its last real text position, and padding is nowhere. What a row gives
        then depends neither on how far it was padded nor on its neighbours. Heads are asked only where a target counts.
        The losses are taken here and not by the caller because sharded weights are whole only inside of this method.

        Args:
            text_inputs: (B, T) ids, START and STOP included; nothing is added to them.
            mel_inputs: (B, C) ids, START included, and STOP where there is to be one.
            conditioning_mel: (B, K, num_mel_bins, F) or (B, num_mel_bins, F); or else give `conditioning_latent`.
            conditioning_latent: (B, D) from `encode_conditioning`, or (1, D) for all rows.
            conditioning_rows: (B,) which of N conditionings each row hears, each of which is encoded once; None: row i
                hears the i-th.
            packing: of these rows and targets, on the same device; None: every position is real, the released layout.
            text_targets: (B, T) ids; only with `packing`, which knows those that count.
            mel_targets: (B, C) ids, likewise.

        Returns: GPTLosses with `packing`, else GPTOutput.
        Raises: ValueError: if a row is longer than its position table, not exactly one conditioning is given, or the
            stack's attention doesn't know packed rows.
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
        conditioning = conditioning_latent.expand(len(text_inputs), -1)
        if packing is None:
            return self._logits(text_inputs, mel_inputs, conditioning)
        hidden = self._packed_states(text_inputs, mel_inputs, conditioning, packing)
        text_targets = text_targets.flatten()[packing.text_targets]
        mel_targets = mel_targets.flatten()[packing.mel_targets]
        text_states = self.final_norm(hidden.index_select(0, packing.text_askers))
        mel_states = self.final_norm(hidden.index_select(0, packing.mel_askers))
        return GPTLosses(
            sum_cross_entropy(self.text_head, text_states, text_targets, self.config.text_vocabulary),
            sum_cross_entropy(self.mel_head, mel_states, mel_targets, self.config.mel_vocabulary),
        )

    def _logits(self, text_inputs: torch.Tensor, mel_inputs: torch.Tensor, conditioning: torch.Tensor) -> GPTOutput:
        text = self.text_embedding(text_inputs) + self.text_pos_embedding(text_inputs)
        mel = self.mel_embedding(mel_inputs) + self.mel_pos_embedding(mel_inputs)
        rows = torch.cat([conditioning.to(text.dtype).unsqueeze(1), text, mel], dim=1)
        hidden = self.gpt(inputs_embeds=rows, use_cache=False).last_hidden_state
        hidden = self.final_norm(hidden[:, 1:])
        text_hidden, latents = hidden.split([text_inputs.shape[1], mel_inputs.shape[1]], dim=1)
        return GPTOutput(self.text_head(text_hidden), self.mel_head(latents), latents)

    def _packed_states(
        self, text_inputs: torch.Tensor, mel_inputs: torch.Tensor, conditioning: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """(N, D) before `final_norm`."""
        implementation = self.gpt.config._attn_implementation
        if implementation != PACKED_SDPA:
            raise ValueError(f'attention "{implementation}" would look across the rows of a packed micro-batch')
        text = self.text_embedding(text_inputs.flatten()[packing.text])
        text = text + self.text_pos_embedding.emb(packing.text % text_inputs.shape[1])
        mel = self.mel_embedding(mel_inputs.flatten()[packing.mel])
        mel = mel + self.mel_pos_embedding.emb(packing.mel % mel_inputs.shape[1])
        row = torch.cat([conditioning.to(text.dtype), text, mel]).index_select(0, packing.order)
        return self.gpt(inputs_embeds=row.unsqueeze(0), use_cache=False, packing=packing).last_hidden_state[0]

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
