"""The chain from text to waveform: sample codes, rank them, take their latents, denoise a mel, vocode it.

Each stage is a method of `Chain` and takes what the one before gave. `speak` runs them for pieces of text; a preview
skips everything behind the codes and makes a rougher sound of them with the DVAE alone.
"""

# N samples · T text ids · C mel codes · D hidden size · F mel frames · S samples of a waveform

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torchaudio
from torch import nn

from tortoise_hf.audio import (
    FFT_SIZE,
    HOP_LENGTH,
    NUM_MEL_BINS,
    SAMPLE_RATE,
    SAMPLE_RATE_24K,
    denormalize_mel_24k,
)
from tortoise_hf.errors import UserError
from tortoise_hf.generation import CLOSING_CODES, SamplingConfig, clean_codes, generate_codes, num_spoken
from tortoise_hf.latents import VoiceLatents
from tortoise_hf.models.vocoder import vocode
from tortoise_hf.samplers import DiffusionSettings, sample_mel
from tortoise_hf.text import TextTokenizer, clean_text

RANKED_AT_ONCE = 32
"""Rows of codes that CLVP scores together."""
FRAMES_PER_CODE = 4

Progress = Callable[[str, int], None]
"""Called with a stage's name and how much of it was just done: samples for "codes", steps for "diffusion"."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much work goes into a piece of text."""

    num_samples: int
    """Rows of codes that are sampled; CLVP picks the one to be spoken."""
    diffusion: DiffusionSettings
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def _preset(num_samples: int, steps: int, sampler: str, guidance: float = 2.0) -> Preset:
    return Preset(num_samples=num_samples, diffusion=DiffusionSettings(sampler=sampler, steps=steps, guidance=guidance))


PRESETS = {
    "single_sample": _preset(8, 10, "dpm++2m"),
    "ultra_fast": _preset(16, 30, "ancestral", guidance=0.0),
    "very_fast": _preset(32, 30, "dpm++2m"),
    "fast": _preset(96, 20, "dpm++2m"),
    "standard": _preset(256, 200, "ancestral"),
    "high_quality": _preset(256, 400, "ancestral"),
}
"""Counts of samples and steps as in the programs people know: tortoise-tts's own (with its sampler) for ultra_fast,
standard and high_quality, tortoise-tts-fast's for single_sample, very_fast and fast."""


def choose_preset(
    name: str,
    *,
    num_samples: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    max_codes: int | None = None,
) -> Preset:
    """A preset, with some of its numbers replaced.

    Raises: UserError: if there is no such preset, or a number makes no sense.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    changes = {"steps": steps, "sampler": sampler}
    diffusion = replace(preset.diffusion, **{key: value for key, value in changes.items() if value is not None})
    changes = {"temperature": temperature, "max_codes": max_codes}
    sampling = replace(preset.sampling, **{key: value for key, value in changes.items() if value is not None})
    preset = replace(preset, num_samples=num_samples or preset.num_samples, diffusion=diffusion, sampling=sampling)
    for what, value, lowest in (
        ("the number of samples", preset.num_samples, 1),
        ("the number of diffusion steps", preset.diffusion.steps, 2),
        ("the temperature", preset.sampling.temperature, 0),
        ("the number of codes", preset.sampling.max_codes, 1),
    ):
        if value < lowest:
            raise UserError(f"{what[0].upper()}{what[1:]} must be at least {lowest}, got {value}.")
    return preset


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
        self._loaders, self._dtype, self._low_memory = dict(loaders), dtype, low_memory
        self._models: dict[str, nn.Module] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The model, on the device, for the time of a `with` block."""
        if name not in self._models:
            dtype = torch.float32 if name in ("vocoder", "dvae") else self._dtype
            self._models[name] = self._loaders[name]().to(self.device, dtype).eval().requires_grad_(False)
        try:
            yield self._models[name]
        finally:
            if self._low_memory:
                del self._models[name]
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


@dataclass
class Chain:
    """The stages from text to waveform for one voice."""

    shelf: ModelShelf
    """Holds `gpt`, and `clvp`, `diffusion`, `vocoder` or, for previews, `dvae`."""
    tokenizer: TextTokenizer
    mel_norms: torch.Tensor
    """(80,) divisors of the GPT's mel; previews undo them."""
    num_mel_codes: int = 8192
    """Codes that CLVP knows."""
    latent_size: int = 1024
    """Width of the latents that the diffusion model reads."""
    batch_size: int | None = None
    """Rows sampled together; None: 16 on the CPU, all on other devices."""
    _stop_mel_id: int = field(default=-1, init=False)

    def text_ids(self, text: str) -> torch.Tensor:
        """(T,) ids of a piece with the one STOP that TorToiSe adds when it speaks."""
        return torch.tensor([*self.tokenizer.encode(text, clean_text), self.tokenizer.stop_id])

    def sample(
        self, text_ids: torch.Tensor, latents: VoiceLatents, preset: Preset, seed: int, progress: Progress | None = None
    ) -> torch.Tensor:
        """Text to (N, C) sampled codes on the CPU; STOP from each row's end on."""
        report = None if progress is None else lambda ended: progress("codes", ended)
        with self.shelf.use("gpt") as gpt:
            batch_size = self.batch_size or (16 if self.shelf.device.type == "cpu" else preset.num_samples)
            codes = generate_codes(
                gpt,
                text_ids,
                latents.gpt,
                preset.num_samples,
                preset.sampling,
                seed=seed,
                batch_size=batch_size,
                progress=report,
            )
            self._stop_mel_id = gpt.config.stop_mel_id
        return codes.cpu()

    @torch.inference_mode()
    def rank(self, text_ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(N,) scores of cleaned codes; the text is encoded once."""
        with self.shelf.use("clvp") as clvp:
            text = clvp.encode_text(text_ids.to(self.shelf.device).view(1, -1))
            scores = [
                (text * clvp.encode_codes(rows.to(self.shelf.device))).sum(-1) for rows in codes.split(RANKED_AT_ONCE)
            ]
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

    def speak(
        self, texts: list[str], latents: VoiceLatents, preset: Preset, seed: int, progress: Progress | None = None
    ) -> list[torch.Tensor]:
        """Say each text, stage by stage: (S,) samples at 24,000 Hz for each.

        A text's result doesn't depend on the others; together they load each model once where memory is short.

        Raises: UserError: if the voice lacks a latent, or the GPT doesn't fit the other models.
        """
        if latents.diffusion is None:
            raise UserError(
                "This voice has no latent for the diffusion model, so only previews can be heard; make it again from "
                "recordings with scripts/voice.py, or ask for a preview."
            )
        self._check_sizes(latents)
        every_ids = [self.text_ids(text) for text in texts]
        rows = []
        for ids in every_ids:
            rows.append(clean_codes(self.sample(ids, latents, preset, seed, progress), self._stop_mel_id))
        if preset.num_samples > 1:
            scores = (self.rank(ids, codes) for ids, codes in zip(every_ids, rows, strict=True))
            best = [codes[int(score.argmax())] for codes, score in zip(rows, scores, strict=True)]
        else:
            best = [codes[0] for codes in rows]
        spoken = [self.latents(ids, codes, latents) for ids, codes in zip(every_ids, best, strict=True)]
        generators = [torch.Generator().manual_seed(seed) for _ in texts]
        mels = [
            self.mel(each, latents, preset.diffusion, generator, progress)
            for each, generator in zip(spoken, generators, strict=True)
        ]
        return [self.waveform(mel, generator) for mel, generator in zip(mels, generators, strict=True)]

    def preview(
        self, texts: list[str], latents: VoiceLatents, preset: Preset, seed: int, progress: Progress | None = None
    ) -> list[torch.Tensor]:
        """Say each text roughly, with one sample, the DVAE and Griffin-Lim: (S,) samples at 22,050 Hz for each."""
        preset = replace(preset, num_samples=1)
        waveforms = []
        for text in texts:
            codes = self.sample(self.text_ids(text), latents, preset, seed, progress)[0]
            codes = codes[codes < self._stop_mel_id - 1]
            if not len(codes):  # STOP at once: a moment of silence
                waveforms.append(torch.zeros(HOP_LENGTH * FRAMES_PER_CODE))
                continue
            with self.shelf.use("dvae") as dvae:
                mel = dvae.decode(codes.to(self.shelf.device).unsqueeze(0))
            waveforms.append(griffin_lim(mel[0].cpu() * self.mel_norms.unsqueeze(1), seed))
        return waveforms

    def _check_sizes(self, latents: VoiceLatents) -> None:
        """The models behind the GPT know the released codebook and width only."""
        with self.shelf.use("gpt") as gpt:
            codes, width = gpt.config.num_mel_codes, gpt.config.hidden_size
        if (codes, width) != (self.num_mel_codes, self.latent_size) or codes <= max(CLOSING_CODES):
            raise UserError(
                f"This voice's GPT is {width:,} wide and speaks {codes:,} codes, the models behind it know "
                f"{self.num_mel_codes:,} codes and a width of {self.latent_size:,}; only a preview of it can be heard."
            )
        if latents.gpt.shape[1] != width:
            raise UserError(
                f"The voice's latents are {latents.gpt.shape[1]:,} wide, its GPT {width:,}; make them again with this "
                f"GPT, see scripts/voice.py."
            )


@torch.no_grad()
def griffin_lim(log_mel: torch.Tensor, seed: int = 0, iterations: int = 60) -> torch.Tensor:
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
