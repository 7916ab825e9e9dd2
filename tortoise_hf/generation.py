"""Text to mel codes: sampling from the GPT with a key-value cache, and what is done to the codes afterwards.

All samples of a text share its prompt, ``[conditioning][START text STOP STOP][START]``, which is computed once. Rows
that have ended leave the batch. A sample depends on the seed and on its number alone: neither on the batch it was in
nor on how many others were asked for.
"""

# N samples · P prompt positions · C mel codes · V mel vocabulary · D hidden size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tortoise_hf.models.gpt import TortoiseGPT

CALM_CODE = 83
"""The code of a silent stretch. Source: TorToiSe's clean-up of generated codes."""
CLOSING_CODES = (45, 45, 248)
"""What a row that has ended is made to end with. Source: the same."""
MAX_CALM_CODES = 8
"""Silent codes in a row after which the rest of a row is cut off. Source: TorToiSe's trimming of latents."""
PLACEHOLDER_ID = 1
"""Stood for all prompt positions in TorToiSe's generation, so its repetition penalty took code 1 for a repeated one."""
CACHE_BLOCK = 64
"""Positions by which the key-value cache grows."""
SHRINK_AT = 0.75
"""Share of rows still going at which the ended ones are taken out of the cache; doing so copies it."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn. The defaults are those of tortoise-tts, top-k included, which it has without saying so."""

    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest code every time."""
    top_k: int = 50
    """Only the so many likeliest codes are drawn from; 0 for all."""
    top_p: float = 0.8
    """Only the likeliest codes that together reach this probability are drawn from; 1 for all."""
    repetition_penalty: float = 2.0
    """Logits of codes that came before are divided (negative ones multiplied) by it; 1 for none."""
    max_codes: int = 500
    """Codes after which a row is cut off; one stands for 46 ms."""


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make what came before less likely.

    Args:
        logits: (N, V).
        seen: (N, V) bool.
        penalty: 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes that may be drawn and their probabilities, likeliest first.

    Temperature, then top-k, then top-p over what is left, as transformers orders them.

    Args:
        logits: (N, V), penalised already.
        temperature: above 0.
        top_k: 0 for all.
        top_p: 1 for all. The likeliest code always stays.

    Returns: (N, top_k) probabilities that add up to 1, with zeros at the end, and the codes.
    """
    values, codes = (logits / temperature).topk(min(top_k, logits.shape[-1]) if top_k else logits.shape[-1])
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[:, 0] = 0
    # Not ">": what is dropped is the tail whose probability is at most 1 - top_p.
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0)
    return probabilities / probabilities.sum(-1, keepdim=True), codes


def draw(logits: torch.Tensor, config: SamplingConfig, uniform: torch.Tensor) -> torch.Tensor:
    """One code for each row: (N, V) penalised logits and (N,) uniform random numbers to (N,) codes."""
    if config.temperature == 0:
        return logits.argmax(-1)
    probabilities, codes = candidates(logits, config.temperature, config.top_k, config.top_p)
    index = (probabilities.cumsum(-1) <= uniform.unsqueeze(1)).sum(-1)
    # Rounding may leave the sum below 1; codes with probability 0 are never taken.
    index = index.clamp(max=(probabilities > 0).sum(-1) - 1)
    return codes.gather(1, index.unsqueeze(1)).squeeze(1)


class CachedGPT:
    """The GPT-2 stack one position at a time, with keys and values of earlier positions kept.

    Written out instead of transformers' cache classes: every row is at the same position, so attention needs no mask,
    ended rows can be taken out, and the buffers grow in blocks.
    """

    def __init__(self, model: TortoiseGPT) -> None:
        self.model = model
        self.length = 0
        self.cache: list[torch.Tensor] = []  # per layer (2, N, heads, room, head size)

    def prompt(self, text_ids: torch.Tensor, conditioning_latent: torch.Tensor) -> torch.Tensor:
        """Read the prompt of one text: (1, T) ids and (1, D) to (1, D), the state that predicts the first code."""
        model, config = self.model, self.model.config
        text = nn.functional.pad(text_ids, (1, 0), value=config.start_text_id)
        text = nn.functional.pad(text, (0, 1), value=config.stop_text_id)
        start = text_ids.new_tensor([[config.start_mel_id]])
        text_rows = model.text_embedding(text) + model.text_pos_embedding(text)
        mel_rows = model.mel_embedding(start) + model.mel_pos_embedding(start)
        latent = conditioning_latent.to(text_rows.dtype).unsqueeze(1)
        return self._advance(torch.cat([latent, text_rows, mel_rows], dim=1))

    def repeat(self, num_rows: int) -> None:
        """Make the prompt that of so many rows."""
        self.cache = [kept.expand(-1, num_rows, -1, -1, -1) for kept in self.cache]

    def code(self, codes: torch.Tensor, position: int) -> torch.Tensor:
        """Read one code per row: (N,) to (N, D), the state that predicts the next.

        Args:
            codes: what was drawn.
            position: place in the mel row; START has 0, so the first code has 1.
        """
        row = self.model.mel_embedding(codes) + self.model.mel_pos_embedding.emb.weight[position]
        return self._advance(row.unsqueeze(1))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, (n,) indices."""
        self.cache = [kept.index_select(1, rows) for kept in self.cache]

    def _advance(self, hidden: torch.Tensor) -> torch.Tensor:
        stack = self.model.gpt
        start, self.length = self.length, self.length + hidden.shape[1]
        for index, block in enumerate(stack.h):
            hidden = hidden + self._attend(index, block.attn, block.ln_1(hidden), start)
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return self.model.final_norm(stack.ln_f(hidden[:, -1]))

    def _attend(self, index: int, attention: nn.Module, hidden: torch.Tensor, start: int) -> torch.Tensor:
        rows, positions, width = hidden.shape
        heads = attention.c_attn(hidden).view(rows, positions, 3, self.model.config.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if start == 0:
            self.cache.append(torch.stack([key, value]))
        elif self.cache[index].shape[3] < self.length:  # always so behind a prompt, which rows may share
            kept = self.cache[index]
            room = kept.new_empty(*kept.shape[:3], self.length + CACHE_BLOCK, kept.shape[4])
            room[:, :, :, :start] = kept[:, :, :, :start]
            self.cache[index] = room
        if start:
            self.cache[index][0, :, :, start : self.length] = key
            self.cache[index][1, :, :, start : self.length] = value
            key, value = self.cache[index][:, :, :, : self.length]
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=start == 0)
        return attention.c_proj(attended.transpose(1, 2).reshape(rows, positions, width))


@torch.inference_mode()
def generate_codes(
    model: TortoiseGPT,
    text_ids: torch.Tensor,
    conditioning_latent: torch.Tensor,
    num_samples: int = 1,
    config: SamplingConfig | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Sample rows of mel codes for one text.

    Args:
        model: in evaluation mode.
        text_ids: (T,) ids with one STOP behind them, as TorToiSe speaks; START and a second STOP are added.
        conditioning_latent: (1, D) or (D,).
        num_samples: N. All are made, whatever the batch size.
        config: how to draw.
        seed: of the draws.
        batch_size: rows computed together; None for all. Changes nothing but speed and memory.
        progress: called with the number of rows that just ended.

    Returns: (N, max_codes) int64 on the model's device. From its first STOP on a row holds STOP; START never occurs.
    Raises: ValueError: if the text or max_codes doesn't fit the model's position tables.
    """
    config = config or SamplingConfig()
    sizes = model.config
    if text_ids.numel() + 2 > sizes.text_positions:
        raise ValueError(f"{text_ids.numel()} text ids, of {sizes.text_positions - 2}")
    if config.max_codes > sizes.mel_positions:
        raise ValueError(f"max_codes {config.max_codes} is more than the model's {sizes.mel_positions} positions")
    device = model.mel_head.weight.device
    # Drawn up front and on the CPU, so that every sample has its own numbers on every device.
    uniform = torch.rand(num_samples, config.max_codes, generator=torch.Generator().manual_seed(seed)).to(device)
    text_ids = text_ids.to(device).view(1, -1)
    latent = conditioning_latent.to(device).view(1, -1)
    prompt = CachedGPT(model)
    state = prompt.prompt(text_ids, latent)
    rows = [
        _sample_batch(model, prompt, state, numbers, config, progress)
        for numbers in uniform.split(batch_size or num_samples)
    ]
    return torch.cat(rows)


def _sample_batch(
    model: TortoiseGPT,
    prompt: CachedGPT,
    state: torch.Tensor,
    uniform: torch.Tensor,
    config: SamplingConfig,
    progress: Callable[[int], None] | None,
) -> torch.Tensor:
    sizes = model.config
    num_rows = len(uniform)
    codes = torch.full((num_rows, config.max_codes), sizes.stop_mel_id, device=uniform.device)
    seen = torch.zeros(num_rows, sizes.mel_vocabulary, dtype=torch.bool, device=uniform.device)
    seen[:, [PLACEHOLDER_ID, sizes.start_mel_id]] = True
    decoder = CachedGPT(model)
    decoder.cache, decoder.length = list(prompt.cache), prompt.length
    decoder.repeat(num_rows)
    state = state.expand(num_rows, -1)
    going = torch.arange(num_rows, device=uniform.device)  # row of `codes` that each row of the cache belongs to
    ended = torch.zeros(num_rows, dtype=torch.bool, device=uniform.device)
    for step in range(config.max_codes):
        logits = model.mel_head(state).float()
        logits = penalize(logits, seen[going], config.repetition_penalty)
        logits[:, sizes.start_mel_id] = -torch.inf
        drawn = draw(logits, config, uniform[going, step])
        drawn = drawn.masked_fill(ended, sizes.stop_mel_id)
        codes[going, step] = drawn
        seen[going, drawn] = True
        now_ended = drawn == sizes.stop_mel_id
        num_ended = int(now_ended.sum())
        if progress is not None and num_ended > int(ended.sum()):
            progress(num_ended - int(ended.sum()))
        ended = now_ended
        if num_ended == len(going) or step + 1 == config.max_codes:
            break
        if len(going) - num_ended <= SHRINK_AT * len(going):
            rest = (~ended).nonzero().squeeze(1)
            decoder.keep(rest)
            going, drawn, ended = going[rest], drawn[rest], ended[rest]
        state = decoder.code(drawn, step + 1)
    if progress is not None and int((~ended).sum()):
        progress(int((~ended).sum()))
    return codes


def clean_codes(codes: torch.Tensor, stop_mel_id: int) -> torch.Tensor:
    """Make sampled rows look like the encoded recordings that CLVP and the diffusion model know.

    What comes from the first STOP on becomes silence, and the whole row's last three codes a fixed ending. A row
    without STOP stays as it is.

    Args:
        codes: (N, C) from `generate_codes`.
        stop_mel_id: the model's STOP.

    Returns: (N, C), new.
    """
    stopped = (codes == stop_mel_id).cumsum(-1) > 0
    cleaned = codes.masked_fill(stopped, CALM_CODE)
    ending = codes.new_tensor(CLOSING_CODES)[-codes.shape[1] :]
    cleaned[stopped.any(-1), -len(ending) :] = ending
    return cleaned


def num_spoken(codes: torch.Tensor) -> int:
    """Codes of a cleaned row, (C,), before its ninth silent one in a row: what is spoken of it."""
    run = 0
    for index, code in enumerate(codes.tolist()):
        run = run + 1 if code == CALM_CODE else 0
        if run > MAX_CALM_CODES:
            return index
    return len(codes)
