"""Audio files to waveforms, waveforms to log-mel spectrograms.

There are two mel front ends because the released models were trained with two: `LogMel` (22,050 Hz) feeds the GPT's
conditioning encoder and the DVAE, `LogMel24k` (24,000 Hz) the diffusion model and the vocoder. Their constants belong
to the released weights; none of them is a setting.
"""

# B batch · S samples · F mel frames, S // 256 + 1

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from safetensors.torch import load_file
from torch import nn

from tortoise_hf.errors import UserError

SAMPLE_RATE = 22_050
"""Hz; what the GPT and the DVAE hear."""
SAMPLE_RATE_24K = 24_000
"""Hz; what the diffusion model hears and the vocoder speaks."""
HOP_LENGTH = 256
"""Samples from one mel frame to the next, at either rate."""
SAMPLES_PER_CODE = 1024
"""Samples at 22,050 Hz that one mel code stands for: four frames."""
NUM_MEL_BINS = 80
NUM_MEL_BINS_24K = 100
FFT_SIZE = 1024
MIRRORED_FRAMES = FFT_SIZE // 2 // HOP_LENGTH
"""First frames of a mel spectrogram that hear the waveform's beginning mirrored: their window reaches past it."""
CUT_FRAMES = 8
"""Frames between two places where a clip may be cut for conditioning: 0.09 s."""
MIN_MEL_SAMPLES = FFT_SIZE // 2 + 1
"""Shortest waveform with a mel spectrogram: its ends are mirrored by half a window."""
LOG_FLOOR = 1e-5
"""Mel energies below this count as this, which makes silence ``log(1e-5)``."""
MEL_24K_RANGE = (-11.512925148010254, 2.3143386840820312)
"""Log-mel values the diffusion model's -1 and 1 stand for: silence, and the loudest its training data had."""

UNKNOWN_WAV_LENGTH = 0x7FFFF000
"""WAV writers that can't go back to fill in the length leave this or more (sox, ffmpeg, arecord)."""
UNKNOWN_FRAMES = 1 << 62
"""libsndfile's frame counts from here on mean that the header doesn't tell."""
MAX_RESAMPLE_KERNEL = 50_000_000
"""Filter taps (200 MB) above which a sample rate is too unrelated to ours for torchaudio's resampler."""
MIN_SAMPLE_RATE = 1_000
"""Hz; a header that tells less is damaged, and believing it would blow a clip up to gigabytes."""
_READ_FRAMES = 1 << 20
# An MP3 whose header doesn't tell its length: libsndfile guesses from the first frame's bit rate and reads no further.
# With this many zero bytes behind it the guess is too long if the bit rate is constant, so nothing is lost; a file that
# is read exactly as far as the guess goes on behind it. Above 1,024 the decoder takes the zeros for damage.
_MP3_PADDING = 1_000
_OGG_LAST_PAGE = 4
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class AudioError(UserError):
    """An audio file that can't be used.

    Attributes:
        reason: ``unreadable`` (not audio, or damaged), ``truncated`` (the file ends before its header says),
            ``non_finite`` (NaN or infinite samples) or ``empty`` (no samples).
        detail: what was found, without the file's name.
    """

    def __init__(self, reason: str, detail: str, name: str = "audio") -> None:
        super().__init__(f"{name}: {detail}")
        self.reason = reason
        self.detail = detail


def decode_audio(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """Decode a WAV, FLAC, OGG or MP3 file, whole.

    Integer samples are divided by their full scale (32,768 for 16 bits), float samples are taken as they are.

    Args:
        source: a path, or the file's bytes.

    Returns: (channels, S) float32 samples and the sample rate in Hz.
    Raises: AudioError: if it isn't audio, ends too early, has no samples, or has samples that aren't numbers.
    """
    name = "audio" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise AudioError("unreadable", f"can't be read ({error.strerror})", name) from error
    if not data:
        raise AudioError("empty", "the file has 0 bytes", name)
    damage = _find_damage(data)
    if damage is not None:
        raise AudioError(*damage, name)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
        length_is_guessed = file.format in ("MP3", "MPEG") and not _mp3_tells_its_length(data)
        if length_is_guessed:
            file = soundfile.SoundFile(io.BytesIO(data + bytes(_MP3_PADDING)))
    except soundfile.SoundFileError as error:
        raise AudioError("unreadable", f"isn't audio that can be decoded ({_reason(error)})", name) from error
    with file:
        samples = _read(file, length_is_guessed, name)
        sample_rate = file.samplerate
    if not samples.shape[1]:
        raise AudioError("empty", "the file has no samples", name)
    if not np.isfinite(samples).all():
        bad = int(np.count_nonzero(~np.isfinite(samples)))
        raise AudioError("non_finite", f"{bad:,} samples are NaN or infinite", name)
    return samples, sample_rate


def load_waveform(source: str | Path | bytes, sample_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Decode a file to mono at the rate asked for.

    Of several channels the first is taken, not their mean, as TorToiSe's own training did. Nothing is trimmed and the
    loudness stays as it is.

    Returns: (S,) float32 in [-1, 1].
    Raises: AudioError: as `decode_audio`, or if the file's sample rate can't be converted.
    """
    samples, source_rate = decode_audio(source)
    common = math.gcd(source_rate, sample_rate)
    num_taps = source_rate // common * (sample_rate // common)
    if source_rate < MIN_SAMPLE_RATE or num_taps > MAX_RESAMPLE_KERNEL:
        name = "audio" if isinstance(source, bytes) else str(source)
        detail = f"its sample rate of {source_rate:,} Hz can't be converted to {sample_rate:,} Hz; save it at 44,100 Hz"
        raise AudioError("unreadable", detail, name)
    return resample(torch.from_numpy(samples[0].copy()), source_rate, sample_rate).clamp_(-1, 1)


def resample(waveform: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """(..., S) samples at `from_rate` Hz to `to_rate` Hz with torchaudio's defaults, the resampler of all caches."""
    return torchaudio.functional.resample(waveform, from_rate, to_rate)


def num_codes(num_samples: int) -> int:
    """Mel codes a clip of so many samples at 22,050 Hz keeps: one for each 1,024 it fills, and one for the rest."""
    return num_samples // SAMPLES_PER_CODE + 1


class LogMel(nn.Module):
    """Log-mel of 22,050 Hz audio: 80 bins to 8 kHz on the HTK scale, of the power spectrum.

    The constants are TorToiSe's. With norms the logarithms are divided by them, which flips the sign (norms are
    negative) and brings each bin near 1.

    Args:
        norms: (80,) divisors, `load_mel_norms`; None leaves the logarithms as they are.
    """

    def __init__(self, norms: torch.Tensor | None = None) -> None:
        super().__init__()
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=FFT_SIZE,
            hop_length=HOP_LENGTH,
            f_max=8000.0,
            n_mels=NUM_MEL_BINS,
            power=2.0,
            norm="slaney",
            mel_scale="htk",
        )
        self.register_buffer("norms", torch.ones(NUM_MEL_BINS) if norms is None else norms.detach().float().clone())

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Spectrogram of waveforms.

        Args:
            waveform: (B, S), or (S,) which counts as a batch of one; in [-1, 1].

        Returns: (B, 80, F) float32.
        Raises: ValueError: if S is below 513.
        """
        return _log_mel(self.spectrogram, waveform) / self.norms.unsqueeze(1)


class LogMel24k(nn.Module):
    """Log-mel of 24,000 Hz audio: 100 bins to 12 kHz on the Slaney scale, of the magnitude spectrum. Not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLE_RATE_24K,
            n_fft=FFT_SIZE,
            hop_length=HOP_LENGTH,
            f_max=12000.0,
            n_mels=NUM_MEL_BINS_24K,
            power=1.0,
            norm="slaney",
            mel_scale="slaney",
        )

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Spectrogram of waveforms: (B, S) or (S,) to (B, 100, F) float32; samples are clamped to [-1, 1].

        Raises: ValueError: if S is below 513.
        """
        return _log_mel(self.spectrogram, waveform.clamp(-1, 1))


def normalize_mel_24k(mel: torch.Tensor) -> torch.Tensor:
    """`LogMel24k`'s output to the range the diffusion model predicts, about [-1, 1]."""
    low, high = MEL_24K_RANGE
    return 2 * (mel - low) / (high - low) - 1


def denormalize_mel_24k(mel: torch.Tensor) -> torch.Tensor:
    """Undo `normalize_mel_24k`."""
    low, high = MEL_24K_RANGE
    return (mel + 1) / 2 * (high - low) + low


def silent_frame(norms: torch.Tensor) -> torch.Tensor:
    """(80,) normalised mel values of digital silence; a clip that is too short is filled up with them."""
    return math.log(LOG_FLOOR) / norms


def load_mel_norms(path: str | Path) -> torch.Tensor:
    """Read the per-bin divisors of `LogMel`.

    Args:
        path: ``.safetensors`` with a tensor ``mel_norms``, ``.pth`` with the bare tensor, or ``.json`` with a list.

    Returns: (80,) float32.
    Raises: UserError: if the file holds anything but 80 finite numbers other than 0.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            norms = load_file(path)["mel_norms"]
        elif path.suffix == ".json":
            norms = torch.tensor(json.loads(path.read_text(encoding="utf-8")))
        else:
            norms = torch.load(path, map_location="cpu", weights_only=True)
        norms = norms.float()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; it should hold the {NUM_MEL_BINS} mel norms.") from None
    except Exception as error:  # what a damaged file raises differs from reader to reader
        raise UserError(f"{path}: can't be read as mel norms ({_reason(error)}); get it again.") from error
    if norms.shape != (NUM_MEL_BINS,) or not norms.isfinite().all() or not norms.all():
        found = f"shape {tuple(norms.shape)}" if norms.shape != (NUM_MEL_BINS,) else "NaN, infinite or zero values"
        raise UserError(f"{path}: mel norms must be {NUM_MEL_BINS} finite numbers other than 0, found {found}.")
    return norms


def _log_mel(spectrogram: nn.Module, waveform: torch.Tensor) -> torch.Tensor:
    """Logarithm of a mel spectrogram, (B, S) or (S,) to (B, bins, F), in float32 under autocast too."""
    if waveform.shape[-1] < MIN_MEL_SAMPLES:
        raise ValueError(f"a mel spectrogram takes at least {MIN_MEL_SAMPLES} samples, got {waveform.shape[-1]}")
    waveform = waveform.float()
    with torch.autocast(waveform.device.type, enabled=False):
        return spectrogram(waveform if waveform.dim() == 2 else waveform.unsqueeze(0)).clamp(min=LOG_FLOOR).log()


def _read(file: soundfile.SoundFile, length_is_guessed: bool, name: str) -> np.ndarray:
    """All samples of an opened file, (channels, S); fewer than its header promises is an error."""
    expected = file.frames if file.frames < UNKNOWN_FRAMES and not length_is_guessed else 0
    # Asked for everything, soundfile would make room for as many frames as the header tells, known or not; and after
    # each read it would seek, which libsndfile can't in files of unknown length.
    file.seekable = lambda: False
    parts: list[np.ndarray] = []
    try:
        while not parts or len(parts[-1]) == _READ_FRAMES:
            parts.append(file.read(_READ_FRAMES, dtype="float32", always_2d=True))
    except soundfile.SoundFileError as error:
        if not expected:
            raise AudioError("unreadable", f"is damaged ({_reason(error)})", name) from error
        detail = f"its header promises {expected:,} samples, decoding them failed ({_reason(error)})"
        raise AudioError("truncated", detail, name) from error
    samples = np.concatenate(parts)
    if length_is_guessed and len(samples) == file.frames:
        raise AudioError("unreadable", "is an MP3 of varying bit rate that doesn't tell its length", name)
    if len(samples) < expected:
        detail = f"its header promises {expected:,} samples, {len(samples):,} are there"
        raise AudioError("truncated", detail, name)
    return np.ascontiguousarray(samples.T)


def _find_damage(data: bytes) -> tuple[str, str] | None:
    """(reason, detail) of damage to a WAV or OGG file where libsndfile would silently return less, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _find_missing_wav_bytes(data)
    return _find_bad_ogg_page(data) if data[:4] == b"OggS" else None


def _find_missing_wav_bytes(data: bytes) -> tuple[str, str] | None:
    position = 12
    while position + 8 <= len(data):
        chunk, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        position += 8
        if chunk == b"data":
            there = len(data) - position
            if there < size < UNKNOWN_WAV_LENGTH:
                return "truncated", f"its header promises {size:,} bytes of samples, {there:,} are there"
            return None
        position += size + size % 2
    return None


def _find_bad_ogg_page(data: bytes) -> tuple[str, str] | None:
    # Pages follow each other without a gap up to the one marked as the last; what stands behind that is no sound.
    position, is_last = 0, False
    while position < len(data) and not is_last:
        header = data[position : position + 27]
        if not b"OggS".startswith(header[:4]):
            return "unreadable", f"is damaged at byte {position:,}, where a page should begin"
        sizes = data[position + 27 : position + 27 + header[26]] if len(header) == 27 else b""
        end = position + 27 + len(sizes) + sum(sizes)
        if len(header) < 27 or len(sizes) < header[26] or end > len(data):
            return "truncated", "its last page is cut off"
        page = data[position : position + 22] + bytes(4) + data[position + 26 : end]
        if _ogg_checksum(page) != int.from_bytes(header[22:26], "little"):
            return "unreadable", f"is damaged between bytes {position:,} and {end:,}, whose checksum is wrong"
        position, is_last = end, bool(header[5] & _OGG_LAST_PAGE)
    return None


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of a page whose checksum field is 0: zlib's polynomial, but begun with 0 and highest bit first."""
    reflected = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _mp3_tells_its_length(data: bytes) -> bool:
    """Whether the first MP3 frame, behind the tags, is one that holds the number of frames."""
    start = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    return any(mark in data[start : start + 256] for mark in (b"Xing", b"Info"))


def _reason(error: Exception) -> str:
    """The library's own words on one line, less its mention of the buffer we read from."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split("object at", 1)[-1].split(": ", 1)[-1].rstrip(".")
