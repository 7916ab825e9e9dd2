"""What the models are told of a speaker: two latents, made from recordings, read, averaged, drawn at random, stored."""

# D hidden size of the GPT · D' of the diffusion model

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tortoise_hf.audio import SAMPLE_RATE, SAMPLE_RATE_24K, LogMel, LogMel24k, load_waveform, resample
from tortoise_hf.errors import UserError
from tortoise_hf.models.diffusion import DiffusionDecoder
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.random_latents import RandomLatents

GPT_CLIP_SAMPLES = 132_300
"""6 s at 22,050 Hz: what the GPT hears of each clip."""
DIFFUSION_CLIP_SAMPLES = 102_400
"""4.3 s at 24,000 Hz: what the diffusion model hears of each clip."""
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
LATENTS_NAME = "latents.safetensors"
"""Where a voice's folder keeps the latents of its speaker."""
CLIPS_FOLDER = "conditioning"
"""Where it keeps recordings of the speaker, as a run does."""


@dataclass(frozen=True)
class VoiceLatents:
    """A voice as the models know it."""

    gpt: torch.Tensor
    """(1, D) for the GPT; called `auto` in TorToiSe's programs."""
    diffusion: torch.Tensor | None
    """(1, 2 D') for the diffusion model; None if only previews are to be heard."""


@torch.inference_mode()
def gpt_latent(clips: Sequence[str | Path], gpt: TortoiseGPT, mel_norms: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """What the GPT hears in recordings of a speaker.

    As in tortoise-tts: 6 s of each clip, from a random place on if it is longer, filled up with silence if it is
    shorter, then the mean over the clips.

    Args:
        clips: audio files, at least one.
        gpt: the GPT whose latent it will be.
        mel_norms: (80,) divisors of its mel.
        seed: of the random places.

    Returns: (1, D) float32 on the CPU.
    Raises: AudioError: if a clip can't be read.
    """
    generator = torch.Generator().manual_seed(seed)
    log_mel = LogMel(mel_norms)
    each = []
    for clip in clips:
        waveform = load_waveform(clip)
        spare = len(waveform) - GPT_CLIP_SAMPLES
        start = int(torch.randint(spare + 1, (1,), generator=generator)) if spare > 0 else 0
        mel = log_mel(_exactly(waveform[start:], GPT_CLIP_SAMPLES))
        each.append(gpt.encode_conditioning(mel.to(gpt.device, gpt.dtype)).float().cpu())
    return torch.cat(each).mean(0, keepdim=True).clone()


@torch.inference_mode()
def diffusion_latent(clips: Sequence[str | Path], diffusion: DiffusionDecoder) -> torch.Tensor:
    """What the diffusion model hears in recordings of a speaker.

    As in tortoise-tts: the first 4.3 s of each clip, converted to 24,000 Hz by way of 22,050, filled up with silence if
    it is shorter, then the mean over the clips.

    Returns: (1, 2 D') float32 on the CPU.
    Raises: AudioError: if a clip can't be read.
    """
    log_mel = LogMel24k()
    each = []
    for clip in clips:
        waveform = resample(load_waveform(clip), SAMPLE_RATE, SAMPLE_RATE_24K)
        mel = log_mel(_exactly(waveform, DIFFUSION_CLIP_SAMPLES))
        each.append(diffusion.encode_conditioning(mel.to(diffusion.device, diffusion.dtype)).float().cpu())
    return torch.cat(each).mean(0, keepdim=True).clone()


@torch.inference_mode()
def random_latent(model: RandomLatents, seed: int) -> torch.Tensor:
    """The latent of a voice nobody has, (1, width) float32 on the CPU; the seed decides which."""
    noise = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return model(noise.to(model.device, model.dtype)).float().cpu().clone()


def average_latents(voices: Sequence[VoiceLatents]) -> VoiceLatents:
    """The voice in the middle of several.

    Raises: UserError: if they belong to models of different sizes.
    """
    if len({(voice.gpt.shape, None if voice.diffusion is None else voice.diffusion.shape) for voice in voices}) != 1:
        raise UserError("These voices can't be averaged: their latents have different sizes.")
    diffusion = None
    if voices[0].diffusion is not None:
        diffusion = torch.stack([voice.diffusion for voice in voices]).mean(0)
    return VoiceLatents(torch.stack([voice.gpt for voice in voices]).mean(0), diffusion)


def save_latents(latents: VoiceLatents, path: str | Path) -> None:
    """Write a voice: as safetensors, or with the suffix `.pth` as the pair of tensors that tortoise-tts reads.

    Raises: UserError: if a `.pth` file is asked for a voice without latent for the diffusion model.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        if latents.diffusion is None:
            raise UserError(
                f"{path}: tortoise-tts needs both latents, and this voice has none for the diffusion model."
            )
        torch.save((latents.gpt, latents.diffusion), path)
        return
    tensors = {"gpt": latents.gpt.contiguous()}
    if latents.diffusion is not None:
        tensors["diffusion"] = latents.diffusion.contiguous()
    save_file(tensors, path)


def load_latents(path: str | Path) -> VoiceLatents:
    """Read what `save_latents` wrote, or a `.pth` file with the latents of a voice from tortoise-tts.

    Raises: UserError: if the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; it should hold the latents of a voice.")
    expected = "expected a voice's latents, one row for the GPT and one for the diffusion model"
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found = [tensors.get("gpt"), tensors.get("diffusion")]
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no latents file ({reason}); {expected}. Make it again.") from error
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); {expected}. Make it again.") from error
    if not isinstance(found, tuple | list) or len(found) < 2 or not isinstance(found[0], torch.Tensor):
        raise UserError(f"{path} holds {_describe(found)}; {expected}.")
    gpt, diffusion = found[:2]
    for latent in (gpt, diffusion):
        if latent is None:
            continue
        if not isinstance(latent, torch.Tensor) or latent.dim() not in (1, 2) or latent.numel() != latent.shape[-1]:
            raise UserError(f"{path} holds {_describe(found)}; {expected}.")
        if not latent.is_floating_point() or not bool(latent.isfinite().all()):
            raise UserError(f"{path}: the latents hold values that are NaN, infinite or no numbers; make it again.")
    return VoiceLatents(gpt.float().view(1, -1), None if diffusion is None else diffusion.float().view(1, -1))


def find_clips(source: str | Path) -> list[Path]:
    """The audio files in a folder, sorted, or the file itself.

    Raises: UserError: if there are none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    clips = sorted(file for file in path.glob("*") if file.suffix.lower() in AUDIO_SUFFIXES) if path.is_dir() else []
    if not clips:
        found = "is not there" if not path.exists() else f"holds no audio files ({', '.join(AUDIO_SUFFIXES)})"
        raise UserError(f"{path} {found}; give recordings of the voice, or a folder of them.")
    return clips


def _exactly(waveform: torch.Tensor, num_samples: int) -> torch.Tensor:
    return torch.nn.functional.pad(waveform[:num_samples], (0, max(0, num_samples - len(waveform))))


def _describe(found: object) -> str:
    if isinstance(found, tuple | list):
        shapes = [str(tuple(item.shape)) if isinstance(item, torch.Tensor) else type(item).__name__ for item in found]
        return f"{len(found)} entries ({', '.join(shapes[:5])})"
    return type(found).__name__
