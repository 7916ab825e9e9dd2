"""Text to mel codes: sampling from the GPT with a key-value cache, and what is done to the codes afterwards.

Samples of one text and of different texts are rows of one batch. Each row has its own length; the prompt
``[conditioning][START text STOP STOP][START]`` is computed once for all samples of a text. A row that has ended leaves
the batch and the next one takes its place, so the batch is full until the last rows are under way. A sample depends on
the seed, its text and its number alone: not on the batch it was in, nor on how many others were asked for.
"""

# B texts · N samples of each · R rows of the batch · C mel codes · V mel vocabulary · D hidden size · L positions

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

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
PROMPTS_AT_ONCE = 16
"""Prompts computed together."""


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


@dataclass(frozen=True)
class Prompt:
    """What the GPT made of a text before the first code."""

    state: torch.Tensor
    """(D,) the state that predicts the first code."""
    cache: list[torch.Tensor]
    """Per layer (2, heads, positions, head size): keys and values."""


class CachedGPT:
    """The GPT-2 stack one position at a time, with keys and values of earlier positions kept.

    Written out instead of transformers' cache classes: rows come and go while others are under way. Every row begins at
    the first place of its part of the cache and keeps its own count of positions; what lies behind is masked.
    """

    def __init__(self, model: TortoiseGPT, most_rows: int) -> None:
        """No row is there yet.

        Args:
            model: in evaluation mode.
            most_rows: rows there is room for at a time.
        """
        self.model, self.most_rows = model, most_rows
        self.lengths: list[int] = []  # positions of each row
        self.cache: list[torch.Tensor] = []  # per layer (2, most_rows, heads, room, head size)

    def read(self, texts: Sequence[torch.Tensor], conditioning_latents: torch.Tensor) -> list[Prompt]:
        """Read the prompts of several texts, given as (T,) ids each and (B, D).

        Shorter ones are padded behind their end, where causal attention doesn't look.
        """
        model, config = self.model, self.model.config
        device, longest = model.mel_head.weight.device, max(len(text) for text in texts)
        rows = []
        for text, latent in zip(texts, conditioning_latents, strict=True):
            ids = nn.functional.pad(text.to(device), (1, 0), value=config.start_text_id)
            ids = nn.functional.pad(ids, (0, 1), value=config.stop_text_id).unsqueeze(0)
            start = ids.new_tensor([[config.start_mel_id]])
            text_row = model.text_embedding(ids) + model.text_pos_embedding(ids)
            mel_row = model.mel_embedding(start) + model.mel_pos_embedding(start)
            row = torch.cat([latent.to(text_row.dtype).view(1, 1, -1), text_row, mel_row], dim=1)
            rows.append(nn.functional.pad(row, (0, 0, 0, longest - len(text))))
        hidden, kept = torch.cat(rows), []
        for block in model.gpt.h:
            query, key, value = self._heads(block.attn, block.ln_1(hidden))
            kept.append((key, value))
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = self._finish(block, hidden, attended)
        prompts = []
        for index, text in enumerate(texts):
            length = len(text) + 4
            state = model.final_norm(model.gpt.ln_f(hidden[index, length - 1]))
            prompts.append(Prompt(state, [torch.stack([k[index, :, :length], v[index, :, :length]]) for k, v in kept]))
        return prompts

    def join(self, prompt: Prompt, num_rows: int) -> None:
        """Let so many rows with this prompt begin, behind those that are there."""
        first, length = len(self.lengths), prompt.cache[0].shape[2]
        self.lengths += [length] * num_rows
        if not self.cache:
            self.cache = [part.new_empty(2, self.most_rows, part.shape[1], 0, part.shape[3]) for part in prompt.cache]
        self._make_room(first, length)
        for kept, part in zip(self.cache, prompt.cache, strict=True):
            kept[:, first : len(self.lengths), :, :length] = part.unsqueeze(1)

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Let rows go; the last ones move into the gaps.

        Returns: for each row that stays, in the new order, which one it was.
        """
        gone, left = set(rows), len(self.lengths) - len(rows)
        order = list(range(left))
        movers = [row for row in range(left, len(self.lengths)) if row not in gone]
        for gap, mover in zip(sorted(row for row in gone if row < left), movers, strict=True):
            order[gap] = mover
            for kept in self.cache:
                kept[:, gap, :, : self.lengths[mover]] = kept[:, mover, :, : self.lengths[mover]]
        self.lengths = [self.lengths[row] for row in order]
        return order

    def code(self, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read one code per row: (R,) to (R, D), the states that predict the next ones.

        Args:
            codes: what was drawn.
            positions: (R,) places in the mel rows; START has 0, so the first code has 1.
        """
        model, num_rows, longest = self.model, len(self.lengths), max(self.lengths) + 1
        self._make_room(num_rows, longest)
        hidden = (model.mel_embedding(codes) + model.mel_pos_embedding.emb(positions)).unsqueeze(1)
        here, rows = torch.tensor(self.lengths, device=hidden.device), torch.arange(num_rows, device=hidden.device)
        mask = None
        if min(self.lengths) + 1 < longest:
            behind = torch.arange(longest, device=hidden.device) > here.unsqueeze(1)
            mask = hidden.new_zeros(num_rows, longest).masked_fill(behind, -torch.inf).view(num_rows, 1, 1, longest)
        for block, kept in zip(model.gpt.h, self.cache, strict=True):
            query, key, value = self._heads(block.attn, block.ln_1(hidden))
            kept[0, rows, :, here], kept[1, rows, :, here] = key[:, :, 0], value[:, :, 0]
            key, value = kept[:, :num_rows, :, :longest]
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            hidden = self._finish(block, hidden, attended)
        self.lengths = [length + 1 for length in self.lengths]
        return model.final_norm(model.gpt.ln_f(hidden[:, 0]))

    def _make_room(self, rows: int, positions: int) -> None:
        """Room for so many positions; what the first rows hold stays. Zeros, because masked NaNs would still spread."""
        for index, kept in enumerate(self.cache):
            room = kept.shape[3]
            if room < positions:
                self.cache[index] = kept.new_zeros(*kept.shape[:3], positions + CACHE_BLOCK, kept.shape[4])
                self.cache[index][:, :rows, :, :room] = kept[:, :rows]

    def _heads(self, attention: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(R, positions, D) to queries, keys and values, (3, R, heads, positions, head size)."""
        heads = attention.c_attn(hidden).view(*hidden.shape[:2], 3, self.model.config.num_heads, -1)
        return heads.permute(2, 0, 3, 1, 4)

    def _finish(self, block: nn.Module, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden = hidden + block.attn.c_proj(attended.transpose(1, 2).reshape(hidden.shape))
        return hidden + block.mlp(block.ln_2(hidden))


@torch.inference_mode()
def generate_codes(
    model: TortoiseGPT,
    texts: Sequence[torch.Tensor],
    conditioning_latents: torch.Tensor,
    num_samples: int = 1,
    config: SamplingConfig | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Sample rows of mel codes for each of several texts.

    Args:
        model: in evaluation mode.
        texts: (T,) ids of each with one STOP behind them, as TorToiSe speaks; START and a second STOP are added.
        conditioning_latents: (B, D), or (1, D) for all texts.
        num_samples: N, of each text. All are made, whatever the batch size.
        config: how to draw.
        seed: of the draws; sample n of any text is drawn with the same numbers.
        batch_size: rows computed together; None for all. Changes nothing but speed and memory.
        progress: called with the number of rows that just ended.

    Returns: (B, N, max_codes) int64 on the CPU. From its first STOP on a row holds STOP; START never occurs.
    Raises: ValueError: if a text or max_codes doesn't fit the model's position tables.
    """
    config = config or SamplingConfig()
    sizes, device = model.config, model.mel_head.weight.device
    for text in texts:
        if len(text) + 2 > sizes.text_positions:
            raise ValueError(f"{len(text)} text ids, of {sizes.text_positions - 2}")
    if config.max_codes > sizes.mel_positions:
        raise ValueError(f"max_codes {config.max_codes} is more than the model's {sizes.mel_positions} positions")
    # Drawn up front and on the CPU, so that every sample has its own numbers on every device.
    uniform = torch.rand(num_samples, config.max_codes, generator=torch.Generator().manual_seed(seed))
    total = len(texts) * num_samples
    codes = torch.full((total, config.max_codes), sizes.stop_mel_id)
    decoder = CachedGPT(model, min(batch_size or total, total))
    prompts = _Prompts(decoder, texts, conditioning_latents.to(device).expand(len(texts), -1))
    fresh = torch.zeros(1, sizes.mel_vocabulary, dtype=torch.bool, device=device)
    fresh[:, [PLACEHOLDER_ID, sizes.start_mel_id]] = True

    waiting = 0  # first row of `codes` that hasn't begun
    # Of each row under way: which row of `codes` it is, how many it has, what came in it, its last state.
    rows: list[int] = []
    steps: list[int] = []
    seen, state = fresh[:0], torch.empty(0, sizes.hidden_size, dtype=model.dtype, device=device)
    while rows or waiting < total:
        joining = range(waiting, min(total, waiting + decoder.most_rows - len(rows)))
        for text, group in groupby(joining, lambda row: row // num_samples):
            num_rows = len(list(group))
            prompt = prompts.get(text, joining[-1] // num_samples)
            decoder.join(prompt, num_rows)
            state = torch.cat([state, prompt.state.expand(num_rows, -1)])
        rows, steps, waiting = [*rows, *joining], steps + [0] * len(joining), joining.stop
        seen = torch.cat([seen, fresh.expand(len(joining), -1)])

        logits = penalize(model.mel_head(state).float(), seen, config.repetition_penalty)
        logits[:, sizes.start_mel_id] = -torch.inf
        drawn = draw(logits, config, uniform[[row % num_samples for row in rows], steps].to(device))
        seen.scatter_(1, drawn.unsqueeze(1), True)
        values = drawn.tolist()  # waits for the device
        codes[rows, steps] = torch.tensor(values)
        steps = [step + 1 for step in steps]
        ended = [
            index
            for index, (code, step) in enumerate(zip(values, steps, strict=True))
            if code == sizes.stop_mel_id or step == config.max_codes
        ]
        if ended:
            order = decoder.leave(ended)
            rows, steps = [rows[index] for index in order], [steps[index] for index in order]
            seen, drawn = seen[order], drawn[order]
            if progress is not None:
                progress(len(ended))
        state = decoder.code(drawn, torch.tensor(steps, device=device)) if rows else state[:0]
    return codes.view(len(texts), num_samples, -1)


class _Prompts:
    """The prompts of texts, asked for in their order: several are read at once, and forgotten when they are past."""

    def __init__(self, decoder: CachedGPT, texts: Sequence[torch.Tensor], latents: torch.Tensor) -> None:
        self.decoder, self.texts, self.latents = decoder, texts, latents
        self.known: dict[int, Prompt] = {}

    def get(self, text: int, last: int) -> Prompt:
        """One text's prompt; those up to `last` will be asked for next."""
        if text not in self.known:
            several = slice(text, min(last + 1, text + PROMPTS_AT_ONCE))
            read = self.decoder.read(self.texts[several], self.latents[several])
            self.known = dict(enumerate(read, start=text))
        return self.known[text]


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
