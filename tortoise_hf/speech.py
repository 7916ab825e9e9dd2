"""The chain from text to waveform: sample codes, rank them, take their latents, denoise a mel, vocode it.

Each stage is a method of `Chain` and takes what the one before gave. `speak` runs them for pieces of text; a preview
skips everything behind the codes and makes a rougher sound of them with the DVAE alone.
"""

# N samples · T text ids · C mel codes · D hidden size · F mel frames · S samples of a waveform

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchaudio
from torch import nn

from tortoise_hf.audio import (
    FFT_SIZE,
    HOP_LENGTH,
    LOG_FLOOR,
    NUM_MEL_BINS,
    SAMPLE_RATE,
    SAMPLE_RATE_24K,
    denormalize_mel_24k,
)
from tortoise_hf.errors import UserError
from tortoise_hf.generation import CLOSING_CODES, clean_codes, generate_codes, num_spoken
from tortoise_hf.latents import VoiceLatents
from tortoise_hf.models.dvae import FRAMES_PER_CODE
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.models.vocoder import vocode
from tortoise_hf.presets import Preset
from tortoise_hf.samplers import DiffusionSettings, sample_mel
from tortoise_hf.text import TextTokenizer, clean_text

logger = logging.getLogger(__name__)

RANKED_AT_ONCE = 32
"""Rows of codes that CLVP scores together; a quarter of them where memory is short."""
CPU_CACHE_BYTES = 2_400_000_000
"""What the keys and values of rows sampled together may take on a CPU: 16 rows at the released size."""
MOST_ROWS_ON_CPU = 64
"""Beyond this many rows a CPU samples no faster, however small the model."""

Progress = Callable[[str, int], None]
"""Called with a stage's name and how much of it was just done: samples for "codes", steps for "diffusion"."""


class ModelShelf:
    """Loads models when they are first needed and, if memory is short, puts each away when its stage is over."""

    def __init__(
        self,
        loaders: Mapping[str, Callable[[], nn.Module]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        low_memory: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            loaders: how to get each model, on the CPU.
            device: where the models compute.
            dtype: in what precision; vocoder and DVAE, which are small, always in float32.
            low_memory: keep only the model in use.
        """
        self.device = device
        self._loaders, self._dtype, self.low_memory = dict(loaders), dtype, low_memory
        self._models: dict[str, nn.Module] = {}
        self._users: dict[str, int] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The model, on the device, for the time of a `with` block; blocks may be nested."""
        if name not in self._models:
            dtype = torch.float32 if name in ("vocoder", "dvae") else self._dtype
            self._models[name] = self._loaders[name]().to(self.device, dtype).eval().requires_grad_(False)
        self._users[name] = self._users.get(name, 0) + 1
        try:
            yield self._models[name]
        finally:
            self._users[name] -= 1
            if self.low_memory and not self._users[name]:
                del self._models[name]
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


@dataclass
class Chain:
    """The stages from text to waveform for one voice."""

    shelf: ModelShelf
    """Holds `gpt`, and `clvp`, `diffusion`, `vocoder` or, for previews, `dvae`."""
    gpt_config: GPTConfig
    """Sizes of the GPT."""
    tokenizer: TextTokenizer
    mel_norms: torch.Tensor
    """(80,) divisors of the GPT's mel; previews undo them."""
    num_mel_codes: int = 8192
    """Codes that CLVP knows."""
    latent_size: int = 1024
    """Width of the latents that the diffusion model reads."""
    batch_size: int | None = None
    """Rows sampled together; None: what fits the device, see `rows_at_once`."""

    def text_ids(self, text: str) -> torch.Tensor:
        """(T,) ids of a piece with the one STOP that TorToiSe adds when it speaks."""
        return torch.tensor([*self.tokenizer.encode(text, clean_text), self.tokenizer.stop_id])

    def sample(
        self,
        every_ids: Sequence[torch.Tensor],
        latents: VoiceLatents,
        preset: Preset,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Texts to (texts, N, C) sampled codes on the CPU; STOP from each row's end on."""
        report = None if progress is None else lambda ended: progress("codes", ended)
        with self.shelf.use("gpt") as gpt:
            positions = 3 + max(len(ids) for ids in every_ids) + preset.sampling.max_codes
            batch_size = self.batch_size or rows_at_once(self.gpt_config, positions, gpt.dtype, self.shelf)
            return generate_codes(
                gpt,
                every_ids,
                latents.gpt,
                preset.num_samples,
                preset.sampling,
                seed=seed,
                batch_size=batch_size,
                progress=report,
            )

    @torch.inference_mode()
    def rank(self, text_ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(N,) scores of cleaned codes; the text is encoded once."""
        with self.shelf.use("clvp") as clvp:
            text = clvp.encode_text(text_ids.to(self.shelf.device).view(1, -1))
            at_once = RANKED_AT_ONCE // (4 if self.shelf.low_memory else 1)
            scores = [(text * clvp.encode_codes(rows.to(self.shelf.device))).sum(-1) for rows in codes.split(at_once)]
            return (torch.cat(scores) * clvp.temperature.float().exp()).cpu()

    @torch.inference_mode()
    def latents(self, text_ids: torch.Tensor, codes: torch.Tensor, latents: VoiceLatents) -> torch.Tensor:
        """What the diffusion model reads of a cleaned row, (C,): (1, spoken codes, D).

        Codes behind the cut can't change what is before it, so they aren't computed.
        """
        device = self.shelf.device
        with self.shelf.use("gpt") as gpt:
            spoken = codes[: num_spoken(codes)].to(device).unsqueeze(0)
            return gpt.latents(text_ids.to(device).view(1, -1), spoken, latents.gpt.to(device)).float()

    @torch.inference_mode()
    def mel(
        self,
        codes_latents: torch.Tensor,
        latents: VoiceLatents,
        settings: DiffusionSettings,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Latents to a (1, 100, F) log-mel at 24,000 Hz."""
        num_frames = codes_latents.shape[1] * FRAMES_PER_CODE * SAMPLE_RATE_24K // SAMPLE_RATE
        report = None if progress is None else lambda: progress("diffusion", 1)
        with self.shelf.use("diffusion") as diffusion:
            told = latents.diffusion.to(self.shelf.device, diffusion.dtype)
            conditioning = diffusion.prepare(codes_latents.to(diffusion.dtype), told, num_frames)
            mel = sample_mel(diffusion, conditioning, settings, generator, report)
        return denormalize_mel_24k(mel)

    def waveform(self, mel: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(1, 100, F) log-mel to (S,) samples at 24,000 Hz on the CPU."""
        with self.shelf.use("vocoder") as vocoder:
            return vocode(vocoder, mel, generator=generator)[0].cpu()

    def best_codes(
        self,
        texts: list[str],
        latents: VoiceLatents,
        preset: Preset,
        seed: int,
        progress: Progress | None = None,
        num_results: int = 1,
    ) -> list[torch.Tensor]:
        """Of each text the sampled rows that CLVP likes best, (num_results, C), best first; STOP from each end on."""
        every_ids = [self.text_ids(text) for text in texts]
        sampled = self.sample(every_ids, latents, preset, seed, progress)
        if preset.num_samples > 1:
            stop = self.gpt_config.stop_mel_id
            with self.shelf.use("clvp"):
                scores = [self.rank(ids, clean_codes(rows, stop)) for ids, rows in zip(every_ids, sampled, strict=True)]
            chosen = [rows[each.topk(num_results).indices] for rows, each in zip(sampled, scores, strict=True)]
        else:
            chosen = list(sampled)
        for text, rows in zip(texts, chosen, strict=True):
            for row in rows:
                self._warn_if_cut_off(text, row)
        return chosen

    def codes(
        self, texts: list[str], latents: VoiceLatents, preset: Preset, seed: int, progress: Progress | None = None
    ) -> list[torch.Tensor]:
        """What is spoken of each text: the sampled row that CLVP likes best, (C,); STOP from its end on."""
        return [rows[0] for rows in self.best_codes(texts, latents, preset, seed, progress)]

    def speak(
        self,
        texts: list[str],
        latents: VoiceLatents,
        preset: Preset,
        seed: int,
        progress: Progress | None = None,
        num_results: int = 1,
    ) -> list[list[torch.Tensor]]:
        """Say each text, stage by stage: of each its best results, best first, (S,) samples at 24,000 Hz.

        A text's result doesn't depend on the others; together they load each model once where memory is short.

        Raises: UserError: if the voice lacks a latent, or the GPT doesn't fit the other models.
        """
        self.check(latents)
        rows = torch.cat(self.best_codes(texts, latents, preset, seed, progress, num_results))
        repeated = [text for text in texts for _ in range(num_results)]
        spoken = self.speak_codes(repeated, list(rows), latents, preset, seed, progress)
        return [spoken[first : first + num_results] for first in range(0, len(spoken), num_results)]

    def speak_codes(
        self,
        texts: list[str],
        rows: list[torch.Tensor],
        latents: VoiceLatents,
        preset: Preset,
        seed: int,
        progress: Progress | None = None,
    ) -> list[torch.Tensor]:
        """Say the codes of each text, (C,), sampled or a recording's: (S,) samples at 24,000 Hz for each."""
        cleaned = [clean_codes(row.unsqueeze(0), self.gpt_config.stop_mel_id)[0] for row in rows]
        with self.shelf.use("gpt"):
            spoken = [
                self.latents(self.text_ids(text), codes, latents) for text, codes in zip(texts, cleaned, strict=True)
            ]
        generators = [torch.Generator().manual_seed(seed) for _ in texts]
        with self.shelf.use("diffusion"):
            mels = [
                self.mel(each, latents, preset.diffusion, generator, progress)
                for each, generator in zip(spoken, generators, strict=True)
            ]
        with self.shelf.use("vocoder"):
            return [self.waveform(mel, generator) for mel, generator in zip(mels, generators, strict=True)]

    def preview(
        self, texts: list[str], latents: VoiceLatents, preset: Preset, seed: int, progress: Progress | None = None
    ) -> list[torch.Tensor]:
        """Say each text roughly, with one sample, the DVAE and Griffin-Lim: (S,) samples at 22,050 Hz for each."""
        rows = self.codes(texts, latents, replace(preset, num_samples=1), seed, progress)
        with self.shelf.use("dvae"):
            mels = [self.preview_mel(row) for row in rows]
        return [griffin_lim(mel, seed) for mel in mels]

    def preview_mel(self, row: torch.Tensor) -> torch.Tensor:
        """(80, F) log-mel of codes, (C,), sampled or a recording's, up to their STOP; not normalised, on the CPU."""
        row = row[row != self.gpt_config.stop_mel_id]
        if not len(row):  # STOP at once: a moment of silence
            return torch.full((NUM_MEL_BINS, FRAMES_PER_CODE), math.log(LOG_FLOOR))
        with self.shelf.use("dvae") as dvae:
            mel = dvae.decode(row.to(self.shelf.device).unsqueeze(0))
        return mel[0].cpu() * self.mel_norms.unsqueeze(1)

    def check(self, latents: VoiceLatents) -> None:
        """Refuse what the models behind the GPT can't speak.

        Raises: UserError: if the voice lacks a latent, or the GPT doesn't fit the other models.
        """
        if latents.diffusion is None:
            raise UserError(
                "This voice has no latent for the diffusion model, so only previews can be heard; make it again from "
                "recordings with scripts/voice.py, or ask for a preview."
            )
        codes, width = self.gpt_config.num_mel_codes, self.gpt_config.hidden_size
        if (codes, width) != (self.num_mel_codes, self.latent_size) or codes <= max(CLOSING_CODES):
            raise UserError(
                f"This voice's GPT is {width:,} wide and speaks {codes:,} codes, the models behind it know "
                f"{self.num_mel_codes:,} codes and a width of {self.latent_size:,}; only a preview of it can be heard."
            )

    def _warn_if_cut_off(self, text: str, codes: torch.Tensor) -> None:
        """A row without STOP ran into the limit."""
        if codes[-1] != self.gpt_config.stop_mel_id:
            logger.warning("%r may be cut off: the voice didn't end within %d codes.", text[:60], len(codes))


def rows_at_once(config: GPTConfig, positions: int, dtype: torch.dtype, shelf: ModelShelf) -> int:
    """Rows of so many positions to sample together.

    As many as `CPU_CACHE_BYTES` holds on a CPU, a quarter of that where memory is short, on a GPU what half of its free
    memory holds. Keys and values take 147 MB per row at the released size and 600 positions, in float32.
    """
    bytes_per_row = 2 * config.num_layers * config.hidden_size * positions * dtype.itemsize
    if shelf.device.type != "cuda":
        fitting = CPU_CACHE_BYTES // (4 if shelf.low_memory else 1) // bytes_per_row
        return max(1, min(MOST_ROWS_ON_CPU, fitting))
    # Growing the cache holds one layer of it twice.
    free = torch.cuda.mem_get_info(shelf.device)[0] / 2 / (1 + 1 / config.num_layers)
    return max(1, int(free / bytes_per_row))


@torch.no_grad()
def griffin_lim(log_mel: torch.Tensor, seed: int = 0, iterations: int = 32) -> torch.Tensor:
    """Waveform of a (80, F) log-mel of 22,050 Hz audio, not normalised, without any model: (S,) in [-1, 1].

    The phases are guessed, so it sounds hollow.
    """
    powers = log_mel.float().exp()
    filters = torchaudio.functional.melscale_fbanks(
        FFT_SIZE // 2 + 1, 0.0, 8000.0, NUM_MEL_BINS, SAMPLE_RATE, norm="slaney", mel_scale="htk"
    )
    spectrum = (torch.linalg.pinv(filters.T) @ powers).clamp(min=0)
    transform = torchaudio.transforms.GriffinLim(n_fft=FFT_SIZE, hop_length=HOP_LENGTH, n_iter=iterations, power=2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        waveform = transform(spectrum)
    return waveform.clamp(-1, 1)
