"""What was said: a waveform with its rate, pieces joined with pauses, and audio files or streams of them."""

# S samples of a waveform

from __future__ import annotations

import base64
import io
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import soundfile
import torch

from tortoise_hf.errors import UserError
from tortoise_hf.latents import AUDIO_SUFFIXES
from tortoise_hf.sentences import Piece

SENTENCE_PAUSE, PARAGRAPH_PAUSE = 0.1, 0.5
"""Seconds of silence between pieces, besides the fraction of a second that a piece itself ends with."""


@dataclass(frozen=True)
class Speech:
    """Something said."""

    waveform: torch.Tensor
    """(S,) float32 in [-1, 1]."""
    sample_rate: int
    """Hz."""
    text: str = ""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.waveform) / self.sample_rate

    def save(self, path: str | Path) -> None:
        """Write it as an audio file of the kind the suffix names: .wav (16 bit), .flac, .ogg or .mp3.

        Raises: UserError: if the kind isn't known or the file can't be written.
        """
        write_speeches(iter([self]), Path(path))

    def _repr_html_(self) -> str:
        """A player, for notebooks."""
        stream = io.BytesIO()
        soundfile.write(stream, self.waveform.numpy(), self.sample_rate, format="WAV")
        data = base64.b64encode(stream.getvalue()).decode("ascii")
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def join_speech(speeches: Sequence[Speech], pieces: Sequence[Piece], text: str) -> Speech:
    """One speech out of pieces, with a pause behind each but the last."""
    parts = []
    for index, (speech, piece) in enumerate(zip(speeches, pieces, strict=True)):
        parts += [speech.waveform, pause_behind(piece, index == len(pieces) - 1, speech.sample_rate)]
    return Speech(torch.cat(parts), speeches[0].sample_rate, text)


def write_speeches(speeches: Iterator[Speech], target: Path | BinaryIO) -> float:
    """Write pieces one after the other as they come, so that a player may follow.

    Args:
        speeches: from `Voice.stream`.
        target: a file, whose suffix names its kind, or an open binary stream, which gets a WAV without a length.

    Returns: seconds written.
    Raises: UserError: if the file can't be written.
    """
    seconds = 0.0
    if not isinstance(target, Path):
        for index, speech in enumerate(speeches):
            if index == 0:
                target.write(_endless_wav_header(speech.sample_rate))
            target.write((speech.waveform * 32_767).round().short().numpy().tobytes())
            target.flush()
            seconds += speech.seconds
        return seconds
    check_kind(target)
    first = next(speeches)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(target, "w", first.sample_rate, channels=1) as file:
            for speech in itertools.chain([first], speeches):
                file.write(speech.waveform.numpy())
                file.flush()
                seconds += speech.seconds
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{target} can't be written ({error}); give another place.") from error
    return seconds


def check_kind(path: Path) -> None:
    """Refuse a file of a kind that can't be written, before anything is spoken.

    Raises: UserError: if it is none of .wav, .flac, .ogg and .mp3.
    """
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        raise UserError(
            f"{path} can't be written: name a {', '.join(AUDIO_SUFFIXES[:-1])} or {AUDIO_SUFFIXES[-1]} file."
        )


def _endless_wav_header(sample_rate: int) -> bytes:
    """Head of a 16-bit mono WAV whose length isn't known yet; players then read to the end."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return b"RIFF\xff\xff\xff\xffWAVE" + form + b"data\xff\xff\xff\xff"


def pause_behind(piece: Piece, last: bool, sample_rate: int) -> torch.Tensor:
    """(S,) of silence that follows a piece; none if it is the last."""
    seconds = 0.0 if last else PARAGRAPH_PAUSE if piece.ends_paragraph else SENTENCE_PAUSE
    return torch.zeros(int(seconds * sample_rate))
