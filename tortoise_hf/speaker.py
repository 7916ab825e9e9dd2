"""Where a voice comes from: the files of its GPT, and the latents of who speaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tortoise_hf.errors import UserError
from tortoise_hf.latents import (
    CLIPS_FOLDER,
    LATENTS_NAME,
    VoiceLatents,
    average_latents,
    diffusion_latent,
    find_clips,
    gpt_latent,
    load_latents,
    random_latent,
)
from tortoise_hf.models.pretrained import RELEASED_BASE
from tortoise_hf.speech import ModelShelf

LATENTS_NAMES = (LATENTS_NAME, "latents.pth")
"""Where a voice's folder may keep the latents of its speaker."""
EXPORT_FOLDER = "export"
"""Where a run's folder keeps its export."""
_GPT_FILES = ("config.json", "model.safetensors", "autoregressive.pth")


def locate_voice(voice: str | Path, revision: str | None) -> Path | str:
    """The folder or file of a voice, fetched from the Hub if it is a repository there.

    Args and errors are those of `Voice.from_pretrained`.
    """
    path = Path(voice).expanduser()
    if revision is not None and (str(voice) == RELEASED_BASE or path.exists()):
        raise UserError(
            f"The revision {revision} can only be had of a voice on the Hub, and {voice} is none; leave it out."
        )
    if str(voice) == RELEASED_BASE:
        return RELEASED_BASE
    if path.is_dir() and not (path / "config.json").is_file() and (path / EXPORT_FOLDER / "config.json").is_file():
        return path / EXPORT_FOLDER
    if path.is_dir() and not any((path / name).is_file() for name in _GPT_FILES) and not any(path.glob("*_gpt.pth")):
        advice = (
            "it is a run that isn't exported yet, see scripts/export.py"
            if (path / "run.json").is_file()
            else "give an export's folder, or a weights file"
        )
        raise UserError(f"The voice {voice} holds no GPT ({' or '.join(_GPT_FILES)}): {advice}.")
    if path.exists():
        return path
    from tortoise_hf.hub.pull import is_hub_name, pull_voice  # only a voice on the Hub takes its client

    if not is_hub_name(str(voice)):
        raise UserError(f"The voice {voice} is neither a folder, a weights file, nor a user/name on the Hub.")
    return pull_voice(str(voice), revision)


def stored_speaker(folder: Path | None, voice: str | Path) -> tuple[Path | None, Path | None]:
    """The latents file and the folder of clips that a voice's folder brings along; at least one of them.

    Raises: UserError: if there is neither.
    """
    places = [] if folder is None else [folder, folder.parent] if folder.name == EXPORT_FOLDER else [folder]
    latents = [place / name for place in places for name in LATENTS_NAMES if (place / name).is_file()]
    clips = [place / CLIPS_FOLDER for place in places if (place / CLIPS_FOLDER).is_dir()]
    if latents or clips:
        return next(iter(latents), None), next(iter(clips), None)
    where = "its folder holds" if folder is not None else "there is"
    raise UserError(
        f"The voice {voice} doesn't say who speaks: {where} no {LATENTS_NAMES[0]} and no {CLIPS_FOLDER}/ with "
        f"recordings. Give recordings (clips), stored latents, or the seed of a random voice; scripts/voice.py stores "
        f"recordings as latents."
    )


def speaker_latents(
    shelf: ModelShelf,
    mel_norms: torch.Tensor,
    clips: str | Path | Sequence[str | Path] | None,
    latents: str | Path | Sequence[str | Path] | None,
    random: int | None,
    preview: bool,
) -> VoiceLatents:
    """Latents from wherever they come; the mean if several sources are given.

    Args:
        shelf: holds the models that listen or draw.
        mel_norms: (80,) divisors of the GPT's mel.
        clips: recordings of the speaker, or folders of them.
        latents: files of stored ones.
        random: seed of a voice nobody has.
        preview: only the GPT's latent is needed.

    Raises: UserError: if a file is missing, damaged or of another model.
    """
    found = [load_latents(path) for path in _as_list(latents)]
    if clips:
        files = [clip for source in _as_list(clips) for clip in find_clips(source)]
        with shelf.use("gpt") as gpt:
            heard = gpt_latent(files, gpt, mel_norms)
        heard_by_diffusion = None
        if not preview:
            with shelf.use("diffusion") as diffusion:
                heard_by_diffusion = diffusion_latent(files, diffusion)
        found.append(VoiceLatents(heard, heard_by_diffusion))
    if random is not None:
        with shelf.use("random_gpt") as generator:
            drawn = random_latent(generator, random)
        drawn_for_diffusion = None
        if not preview:
            with shelf.use("random_diffusion") as generator:
                drawn_for_diffusion = random_latent(generator, random)
        found.append(VoiceLatents(drawn, drawn_for_diffusion))
    if len(found) == 1:
        return found[0]
    if preview:
        found = [VoiceLatents(each.gpt, None) for each in found]
    return average_latents(found)


def _as_list(value: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    if value is None:
        return []
    return [value] if isinstance(value, str | Path) else list(value)
