"""What an evaluation compares a voice with: recordings of it, recordings of others, and texts."""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import soundfile

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.config import DataConfig
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.errors import UserError
from tortoise_hf.evaluation.recognition import spoken_words
from tortoise_hf.latents import AUDIO_SUFFIXES
from tortoise_hf.run import CLIPS_FILE, RUN_FILE

logger = logging.getLogger(__name__)

NUM_REFERENCE_CLIPS = 4
"""Recordings a voice is told its speaker by, if it doesn't bring a speaker along."""
_BEST_REFERENCE_SECONDS = 8.0  # TorToiSe takes about 6 to 10 s of each reference clip


@dataclass(frozen=True)
class Recording:
    """A recording somebody made."""

    path: Path
    text: str
    """What is said; "" if nobody wrote it down."""
    seconds: float


@dataclass(frozen=True)
class Recordings:
    """Recordings of one speaker in two parts."""

    held_out: list[Recording]
    """Judged like the voice's outputs; their texts are spoken. No run trained on them."""
    known: list[Recording]
    """What the measures learn the speaker from."""
    speaker: str
    """Name in the list; "" if it gives none."""
    source: str
    """Where they came from, for people."""

    def reference_clips(self) -> list[Path]:
        """A few known recordings to tell a model who speaks, of about eight seconds where there are such."""
        order = sorted(self.known, key=lambda clip: (abs(clip.seconds - _BEST_REFERENCE_SECONDS), clip.path))
        return [clip.path for clip in order[:NUM_REFERENCE_CLIPS]]


def recordings_of_run(run: Path, speaker: str | None = None, seed: int = 0) -> Recordings:
    """The clips a run held out, and those it trained on, in an order that the seed decides.

    Raises: UserError: if it isn't a run, its recordings are gone, or none was held out.
    """
    try:
        settings = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["config"]["data"]
        trained = set(json.loads((run / CLIPS_FILE).read_text(encoding="utf-8")))
        cfg = DataConfig(**{key: value for key, value in settings.items() if key in DataConfig.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run} is not the folder of a run that can be read ({error}); give the folder that scripts/train.py "
            f"wrote, with {RUN_FILE} and {CLIPS_FILE}."
        ) from error
    clips = _read_clips(cfg, speaker)
    known = [clip for clip_id, clip in clips if clip_id in trained]
    held_out = [clip for clip_id, clip in clips if clip_id not in trained and cfg.min_seconds <= clip.seconds
                and clip.seconds * SAMPLE_RATE <= cfg.max_samples]  # fmt: skip
    if not held_out or not known:
        raise UserError(
            f"{run}: {len(known):,} of its training clips and {len(held_out):,} clips it held out were found in "
            f"{cfg.root}; both are needed. Bring the recordings back, or name others with --data."
        )
    random.Random(seed).shuffle(held_out)
    random.Random(seed).shuffle(known)
    return Recordings(held_out, known, speaker or "", str(cfg.root))


def recordings_in(place: str, num_held_out: int, speaker: str | None = None, seed: int = 0) -> Recordings:
    """The recordings in a data set's folder, archive or Hub repository, some of them set aside.

    Args:
        place: as `data.root`.
        num_held_out: how many to set aside; at most half.
        speaker: whose, where there are several.
        seed: decides which.

    Raises: UserError: if there are fewer than two that can be used, or of several speakers.
    """
    clips = [clip for _, clip in _read_clips(DataConfig(root=place), speaker)]
    if len(clips) < 2:
        raise UserError(
            f"{place} holds {len(clips)} recordings with a transcript that can be read; at least 2 are needed."
        )
    random.Random(seed).shuffle(clips)
    count = min(num_held_out, len(clips) // 2)
    return Recordings(clips[:count], clips[count:], speaker or "", place)


def voices_in(place: str, without: str, clips_per_voice: int, seed: int = 0) -> dict[str, list[Recording]]:
    """Recordings of several speakers: of a data set with a speaker column, or of a folder with a folder for each.

    Args:
        place: as `data.root`, or a folder of folders with audio files.
        without: a speaker to leave out, because it is the voice that is evaluated.
        clips_per_voice: most recordings of each.
        seed: decides which.

    Raises: UserError: if there is nobody, or somebody of whom there are too few recordings.
    """
    voices: dict[str, list[Recording | None]] = defaultdict(list)
    folders = [folder for folder in sorted(Path(place).glob("*/")) if any(_audio_files(folder))]
    if folders and not any(Path(place).glob("*.csv")) and [folder.name for folder in folders] != ["wavs"]:
        for folder in folders:
            for path in _audio_files(folder):
                voices[folder.name].append(_recording(path, ""))
    else:
        rows = read_rows(DataConfig(root=place, missing="skip"))
        for part in (rows.train, rows.eval) if rows.eval is not None else (rows.train,):
            for speaker, path, problem in zip(part["speaker"], part["audio_path"], part["problem"], strict=True):
                if path and not problem:
                    voices[speaker].append(_recording(path, ""))
    voices.pop(without, None)
    if not voices or list(voices) == [""]:
        raise UserError(
            f"{place} doesn't tell voices apart: expected a list with a speaker column (audio_file|text|speaker), or "
            "a folder of recordings for each voice."
        )
    for name, clips in voices.items():
        clips[:] = [clip for clip in clips if clip is not None]
        if len(clips) < 4:
            raise UserError(f"{place}: there are {len(clips)} recordings of {name or 'nobody'}, at least 4 are needed.")
        random.Random(seed).shuffle(clips)
    return {name: clips[:clips_per_voice] for name, clips in sorted(voices.items())}


def read_texts(path: Path) -> list[str]:
    """Texts out of a file, one per line; of `printed|spoken` lines the first column counts.

    Raises: UserError: if the file can't be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text ({error}); give a file with one text per line.") from error
    texts = [line.split("|")[0].strip() for line in lines]
    texts = [text for text in texts if spoken_words(text)]
    if not texts:
        raise UserError(f"{path} holds no text; write one per line.")
    return texts


def _read_clips(cfg: DataConfig, speaker: str | None) -> list[tuple[str, Recording]]:
    """(clip id, recording) of every row with words and a file, of one speaker."""
    rows = read_rows(cfg)
    clips, speakers = [], defaultdict(int)
    for part in (rows.train, rows.eval) if rows.eval is not None else (rows.train,):
        for row in part:
            if row["problem"] or not row["audio_path"] or not spoken_words(row["text"]):
                continue
            speakers[row["speaker"]] += 1
            if speaker is None or row["speaker"] == speaker:
                clip = _recording(row["audio_path"], row["text"])
                if clip is not None:
                    clips.append((row["clip_id"], clip))
    names = ", ".join(sorted(speakers))
    if speaker is not None and speaker not in speakers:
        raise UserError(f"{cfg.root} has no recordings of {speaker}; it has of: {names or 'nobody'}.")
    if speaker is None and len(speakers) > 1:
        raise UserError(f"{cfg.root} holds recordings of several speakers ({names}); say whose with --speaker.")
    return clips


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES) if folder.is_dir() else []


def _recording(path: str | Path, text: str) -> Recording | None:
    """None if the file's header can't be read; the check of the data set names such files."""
    try:
        return Recording(Path(path), text, soundfile.info(path).duration)
    except (OSError, soundfile.SoundFileError) as error:
        logger.warning("%s is left out: it can't be read (%s).", path, error)
        return None
