"""Who speaks in a published voice: reference clips out of the training data, and what its models hear in them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import soundfile
import torch
from safetensors.torch import load_file

from tortoise_hf.audio import SAMPLE_RATE, AudioError, load_mel_norms, load_waveform
from tortoise_hf.config import DataConfig
from tortoise_hf.errors import UserError
from tortoise_hf.latents import CLIPS_FOLDER, LATENTS_NAME, VoiceLatents, diffusion_latent, gpt_latent, save_latents
from tortoise_hf.models.chain import find_parts, load_part, part_config
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

NUM_CLIPS = 4
_BEST_SECONDS = 8.0  # TorToiSe takes about 6 to 10 s of each reference clip
_MOST_MEASURED = 1000


def write_clips(cfg: DataConfig, clip_ids: Iterable[str], run_dir: Path) -> None:
    """Keep a few reference clips of the speaker with the run, as WAV files of 22.05 kHz.

    Clips of about eight seconds are chosen from the training clips, spread over them; of several speakers, those of the
    one with most clips.

    Args:
        cfg: where the recordings are; read again.
        clip_ids: of the training clips.
        run_dir: the run's folder.

    Raises:
        UserError: if the recordings aren't there any more, or none can be read.
    """
    folder = run_dir / CLIPS_FOLDER
    if folder.is_dir():
        return
    from tortoise_hf.data.ljspeech import read_rows  # pushing alone does without the datasets library

    wanted = set(clip_ids)
    rows = read_rows(cfg).train
    columns = (rows["clip_id"], rows["speaker"], rows["audio_path"])
    found = [(speaker, path) for clip, speaker, path in zip(*columns, strict=True) if clip in wanted and path]
    counts = Counter(speaker for speaker, _ in found)
    most = max(counts, key=counts.get, default="")
    paths = [path for speaker, path in found if speaker == most]
    lengths = []
    for path in paths[:: max(1, len(paths) // _MOST_MEASURED)]:
        try:
            lengths.append((abs(soundfile.info(path).duration - _BEST_SECONDS), path))
        except RuntimeError:  # not a file libsndfile knows
            continue
    staging = run_dir / f".{CLIPS_FOLDER}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for number, (_, path) in enumerate(sorted(lengths)[:NUM_CLIPS], start=1):
        try:
            waveform = load_waveform(Path(path))
        except AudioError:
            continue
        soundfile.write(staging / f"clip-{number}.wav", waveform.numpy(), SAMPLE_RATE, "PCM_16")
    if not any(staging.iterdir()):
        staging.rmdir()
        raise UserError(f"none of the {len(wanted):,} training clips is a recording that can be read")
    staging.rename(folder)


def write_latents(voice: Path, gpt: Callable[[], TortoiseGPT], weights_dir: str | Path | None = None) -> None:
    """Store what a voice's own GPT hears in its clips, and the diffusion model where it is on this machine.

    Latents that lie there are left alone.

    Args:
        voice: folder with `mel_norms.safetensors` and clips in `conditioning/`.
        gpt: gives the voice's GPT; called if it is needed.
        weights_dir: folder with the released files; else the Hub's cache is looked into. Nothing is fetched.

    Raises:
        UserError: if a clip can't be read.
    """
    clips = sorted((voice / CLIPS_FOLDER).glob("*.wav"))
    if not clips or (voice / LATENTS_NAME).exists():
        return
    model = gpt().eval()
    heard = gpt_latent(clips, model, load_mel_norms(voice / "mel_norms.safetensors"))
    latents = VoiceLatents(heard, _heard_by_diffusion(clips, model.config.hidden_size, weights_dir))
    save_latents(latents, voice / LATENTS_NAME)


def map_gpt(voice: Path) -> TortoiseGPT:
    """A voice's GPT with its weights mapped from the file, so that only those that listen are read.

    Args:
        voice: folder with `config.json` and `model.safetensors`.
    """
    with torch.device("meta"):
        gpt = TortoiseGPT(GPTConfig.from_pretrained(voice))
    gpt.load_state_dict(load_file(voice / "model.safetensors"), strict=True, assign=True)
    return gpt


def _heard_by_diffusion(clips: Sequence[Path], width: int, weights_dir: str | Path | None) -> torch.Tensor | None:
    try:
        path = find_parts(["diffusion"], weights_dir, offline=True)["diffusion"]
    except UserError:  # it isn't here
        return None
    if part_config("diffusion", path).latent_size != width:  # made for GPTs of another size
        return None
    return diffusion_latent(clips, load_part("diffusion", path))
