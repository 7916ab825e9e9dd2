"""Speak texts with flite and espeak-ng: waveforms at LJSpeech's rate, with the same short silence around each."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from tortoise_hf.errors import UserError

SAMPLE_RATE = 22_050
"""Hz, LJSpeech's rate. flite speaks at 16 000 Hz, so nothing is heard above 8 000 Hz; espeak-ng at this rate."""
QUANTUM = 16
"""Samples are multiples of this (12 of 16 bits), which makes the FLAC files a third smaller. The rounding noise is
78 dB below full scale, and digital silence stays silent."""
SILENCE = 0.1
"""Seconds of silence before and after the speech of every clip."""
_SILENT_DB = -45
"""A stretch of 5 ms is silent if its RMS is that far below the clip's peak."""
_LEVEL_DB = -20
"""RMS of a clip's speech, dB of full scale. flite's voices then have peaks of 0.35 to 0.75."""
GAIN_FREQUENCIES = (150, 400, 1000, 2500, 5000, 8000)
"""Hz; between them a gain changes evenly over the logarithm of the frequency."""
_PEAK = 0.9
"""Clips with higher peaks are quieter instead: some of espeak-ng's."""


@dataclass(frozen=True)
class Speaker:
    """A voice of a synthesizer, changed so that it sounds like somebody else."""

    name: str
    program: str
    """flite or espeak-ng."""
    voice: str
    """The program's name for it."""
    options: tuple[str, ...] = ()
    """More of the program's options."""
    shift: float = 1.0
    """Factor on all frequencies, formants and pitch, by playing it faster; the options make it speak slower."""
    pitch: float = 1.0
    """Factor on the pitch alone, before the shift, by the WORLD vocoder."""
    gains: tuple[float, ...] = ()
    """dB at `GAIN_FREQUENCIES`, as another vocal tract and another microphone have them."""


def find_program(name: str) -> str:
    """Path of a synthesizer.

    Raises:
        UserError: if it is not installed.
    """
    program = shutil.which(name)
    if program is None:
        raise UserError(
            f"{name}, which speaks the sentences, was not found on PATH; install it (`apt install {name}`)."
        )
    return program


def speak(text: str, speaker: Speaker) -> np.ndarray:
    """Speak one text.

    Args:
        text: written out, as it is to be spoken.
        speaker: who speaks.

    Returns:
        (S,) int16 at `SAMPLE_RATE`: `SILENCE`, speech at a fixed level, `SILENCE`.

    Raises:
        UserError: if the program is missing or fails.
    """
    program = find_program(speaker.program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        if speaker.program == "flite":
            command = [program, "-voice", speaker.voice, *speaker.options, "-t", text, "-o", str(path)]
        else:
            command = [program, "-v", speaker.voice, *speaker.options, "-w", str(path), text]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not path.exists():
            reason = result.stderr.strip() or f"exit status {result.returncode}"
            raise UserError(f"{speaker.program} could not speak {text!r} with the voice {speaker.voice} ({reason}).")
        samples, spoken_rate = soundfile.read(path, dtype="float64")
    if speaker.pitch != 1:
        samples = _change_pitch(samples, spoken_rate, speaker.pitch)
    # Rates with a large common divisor keep the resampling filter short.
    played_rate = round(spoken_rate * speaker.shift / 50) * 50
    # In float64 the rounding below does not depend on the order of additions, so other machines give the same samples.
    samples = torchaudio.functional.resample(torch.from_numpy(samples), played_rate, SAMPLE_RATE).numpy()
    speech = _trim(_equalize(samples, speaker.gains) if speaker.gains else samples)
    rms, peak = np.sqrt(np.mean(speech**2)), np.abs(speech).max()
    speech = speech * min(10 ** (_LEVEL_DB / 20) / rms, _PEAK / peak)
    silence = np.zeros(round(SILENCE * SAMPLE_RATE))
    quantized = np.round(np.concatenate([silence, speech, silence]) * 32768 / QUANTUM) * QUANTUM
    return quantized.astype(np.int16)


def write_clip(path: Path, samples: np.ndarray) -> None:
    """Write int16 samples (S,) as FLAC."""
    soundfile.write(path, samples, SAMPLE_RATE, "PCM_16", compression_level=1.0)


def _change_pitch(samples: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Multiply the pitch and keep formants and duration; float64 (S,) to about (S,)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources
            import pyworld
    except ModuleNotFoundError:
        raise UserError(
            "Changing a voice's pitch takes the package pyworld; install it (`pip install -e '.[corpus]'`)."
        ) from None
    f0, envelope, aperiodicity = pyworld.wav2world(samples, rate)
    return pyworld.synthesize(f0 * factor, envelope, aperiodicity, rate)


def _equalize(samples: np.ndarray, gains: tuple[float, ...]) -> np.ndarray:
    """Raise and lower parts of the spectrum, without delay; (S,) to (S,)."""
    # Past the end there is room for what the filter draws out, so that it doesn't come round to the beginning.
    length = len(samples) + SAMPLE_RATE // 10
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    decibels = np.interp(np.log(np.maximum(frequencies, 1)), np.log(GAIN_FREQUENCIES), gains)
    return np.fft.irfft(np.fft.rfft(samples, length) * 10 ** (decibels / 20), length)[: len(samples)]


def _trim(samples: np.ndarray) -> np.ndarray:
    """Cut the silence off both ends, to within 5 ms."""
    block = round(0.005 * SAMPLE_RATE)
    num_blocks = len(samples) // block
    rms = np.sqrt(np.mean(samples[: num_blocks * block].reshape(num_blocks, block) ** 2, axis=1))
    spoken = np.flatnonzero(rms > 10 ** (_SILENT_DB / 20) * np.abs(samples).max())
    return samples[spoken[0] * block : (spoken[-1] + 1) * block]
