"""What a clip is turned into before training: text ids, mel spectrogram and mel codes, each computed once and stored.

A clip is encoded alone, followed by digital silence, so its codes never depend on what else is in a batch. The records
lie in a `ShardStore`; the examples are a view of them: memory-mapped, so a large dataset needs little memory.
"""

# S samples · F mel frames · C mel codes

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from tortoise_hf.audio import (
    CUT_FRAMES,
    FFT_SIZE,
    HOP_LENGTH,
    MIRRORED_FRAMES,
    SAMPLES_PER_CODE,
    AudioError,
    LogMel,
    load_waveform,
    num_codes,
)
from tortoise_hf.data.store import Found, Record, make_key
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.text import UNK_ID, TextTokenizer, clean_training_text

CLIPS_VERSION = 4
"""Raise it when the same recording would give another record: it belongs to the name of every clip store."""
SILENT_BELOW = 1e-3
"""Share of full scale that the loudest sample of a clip must reach, -60 dB: 33 steps of 16 bits, too few for speech.
The dither of a muted 16-bit track has one or two."""
TEXTS_VERSION = 1
"""Raise it when the same text would give another record, for instance because `clean_training_text` changed."""
RESAMPLER = "torchaudio.functional.resample"
"""Names the resampler in the store; others differ by up to 0.1 on a noisy tone."""

CLIP_FEATURES = Features(
    {
        "status": Value("string"),  # ok, skipped (outside the limits, not encoded), silent, or a reason of AudioError
        "detail": Value("string"),
        "num_samples": Value("int32"),  # at 22 050 Hz
        "mel": List(Value("float16")),  # (F, 80) flattened, normalised, until the first frame of silence after the clip
        "mel_cuts": List(Value("float16")),  # (N, 2, 80) flattened: first frames of the clip cut before frame 0, 8, ...
        "mel_codes": List(Value("int16")),  # (C,)
    }
)
MEL_FEATURES = Features({name: CLIP_FEATURES[name] for name in ("status", "detail", "num_samples", "mel")})
"""Of clips without codes; there the mel isn't normalised."""
TEXT_FEATURES = Features(
    {
        "cleaned": Value("string"),
        "unknown": Value("string"),  # characters the tokenizer doesn't know, with spaces between
        "text_ids": List(Value("int16")),
    }
)


class EncodedClip(NamedTuple):
    """What a recording is turned into."""

    mel: np.ndarray
    """(F, 80) float16 frames up to the first that hears only silence."""
    mel_cuts: np.ndarray
    """(N, 2, 80) float16: the first two frames of what is left when the clip is cut before frame 0, 8, 16, ... They
    hear that beginning mirrored, so they are others than in the middle of `mel`; and the conditioning encoder answers
    in the place of the very first frame."""
    mel_codes: np.ndarray
    """(C,) int16, S // 1024 + 1 of them."""


_NOTHING = EncodedClip(np.zeros(0, np.float16), np.zeros(0, np.float16), np.zeros(0, np.int16))


def num_frames(num_samples: int) -> int:
    """Mel frames of a clip of so many samples at 22 050 Hz, up to the first that hears only the silence behind it."""
    return (num_samples + FFT_SIZE // 2) // HOP_LENGTH + 1


def clip_key(path: str) -> str:
    """Key of a recording: its path, size and time of change. The file isn't opened.

    Raises:
        OSError: if there is no such file.
    """
    status = os.stat(path)
    return make_key(path, status.st_size, status.st_mtime_ns)


class ClipReader:
    """Decodes recordings and makes records of those within the limits. Can be pickled.

    What is kept of a clip is up to the `encode` of a subclass.
    """

    device: str | torch.device = "cpu"
    """Where `encode` computes."""

    def __init__(self, min_samples: int, max_samples: int) -> None:
        """Set the limits: shortest and longest clip encoded, in samples at 22 050 Hz."""
        self.min_samples = min_samples
        self.max_samples = max_samples
        self._main_process = os.getpid()

    def encode(self, waveform: torch.Tensor) -> EncodedClip:
        """What is kept of one clip, (S,) at 22 050 Hz."""
        raise NotImplementedError

    def share_cores(self) -> None:
        """In a worker process, compute with one thread."""
        if os.getpid() != self._main_process:
            # The processes share the cores already, and torch's threads don't survive a fork.
            torch.set_num_threads(1)

    def skipped_key(self, key: str) -> str:
        """Key of the note that a clip was too short or too long; other limits need another look."""
        return make_key(key, self.min_samples, self.max_samples)

    def __call__(self, keys: list[str], paths: list[str]) -> Iterator[Record]:
        """Decode and encode recordings one by one.

        A clip outside the limits gets a note under its `skipped_key`. One that can't be opened at all gets no record:
        whatever the reason is, it may be gone next time without a trace in the file.

        Args:
            keys: of the recordings.
            paths: of the files.
        """
        for key, path in zip(keys, paths, strict=True):
            try:
                waveform = load_waveform(Path(path).read_bytes())
            except AudioError as error:
                yield _record(key, error.reason, error.detail)
                continue
            except OSError:
                continue
            if not self.min_samples <= len(waveform) <= self.max_samples:
                yield _record(self.skipped_key(key), "skipped", "", len(waveform))
            elif (loudest := float(waveform.abs().max())) < SILENT_BELOW:
                detail = f"its loudest sample is {loudest:.1g} of full scale, expected {SILENT_BELOW:g} or more"
                yield _record(key, "silent", detail, len(waveform))
            else:
                yield _record(key, "ok", "", len(waveform), self.encode(waveform))


class MelReader(ClipReader):
    """Keeps the log-mel alone, not normalised; records with `MEL_FEATURES`."""

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor) -> EncodedClip:
        """Log-mel of one clip as if endless silence followed it."""
        self.share_cores()
        padded = torch.nn.functional.pad(waveform, (0, 2 * FFT_SIZE))
        mel = LogMel()(padded)[0, :, : num_frames(len(waveform))]
        return _NOTHING._replace(mel=mel.T.half().numpy())


class ClipEncoder(ClipReader):
    """Keeps mel spectrogram and codes. A worker process loads the DVAE by itself."""

    def __init__(
        self,
        dvae: DVAE | Callable[[], DVAE],
        mel_norms: torch.Tensor,
        min_samples: int,
        max_samples: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """Set up; nothing is loaded yet.

        Args:
            dvae: the module, or a function that loads it. With several processes give a function, or each process is
                sent the weights.
            mel_norms: (80,) divisors of the mel spectrogram.
            min_samples: shortest clip encoded, in samples at 22 050 Hz.
            max_samples: longest.
            device: where to compute.
        """
        super().__init__(min_samples, max_samples)
        self.dvae = dvae
        self.mel_norms = mel_norms.detach().cpu()
        self.device = device
        self._networks: tuple[LogMel, DVAE] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_networks": None}

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor) -> EncodedClip:
        """Mel spectrogram and codes of one clip as if endless silence followed it.

        Args:
            waveform: (S,) at 22 050 Hz.
        """
        log_mel, dvae = self._load()
        count = num_codes(len(waveform))
        # There is silence as far as the last code kept sees.
        padded = torch.zeros((count + dvae.config.reach) * SAMPLES_PER_CODE, device=self.device)
        padded[: len(waveform)] = waveform.to(self.device)
        mel = log_mel(padded)
        codes = dvae.encode(mel)[0, :count]
        cut_samples = CUT_FRAMES * HOP_LENGTH
        num_cuts = max(1, len(waveform) // cut_samples)
        cuts = log_mel(padded[: num_cuts * cut_samples].view(num_cuts, cut_samples))[:, :, :MIRRORED_FRAMES]
        return EncodedClip(
            mel[0, :, : num_frames(len(waveform))].T.half().cpu().numpy(),
            cuts.transpose(1, 2).half().cpu().numpy(),
            codes.cpu().numpy().astype(np.int16),
        )

    def _load(self) -> tuple[LogMel, DVAE]:
        if self._networks is None:
            self.share_cores()
            dvae = self.dvae if isinstance(self.dvae, torch.nn.Module) else self.dvae()
            assert dvae.config.num_codes <= 1 << 15, "codes are stored in 16 bits"
            self._networks = LogMel(self.mel_norms).to(self.device), dvae.to(self.device).eval()
        return self._networks


def _record(key: str, status: str, detail: str, num_samples: int = 0, clip: EncodedClip = _NOTHING) -> Record:
    return {"key": key, "status": status, "detail": detail, "num_samples": num_samples, **clip._asdict()}


class TextEncoder:
    """Makes the records of texts. Can be pickled."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Encode with `tokenizer`."""
        self.tokenizer = tokenizer

    def __call__(self, keys: list[str], texts: list[str]) -> Iterator[Record]:
        """Clean and tokenise texts, as they are cleaned for training."""
        for key, text in zip(keys, texts, strict=True):
            cleaned = clean_training_text(text)
            ids = self.tokenizer.encode(cleaned, cleaner=str)
            unknown = self.tokenizer.unknown_characters(cleaned, cleaner=str) if UNK_ID in ids else []
            yield {
                "key": key,
                "cleaned": cleaned,
                "unknown": " ".join(unknown),
                "text_ids": np.array(ids, dtype=np.int16),
            }


def join_examples(columns: dict[str, Sequence[Any]], texts: Found, clips: Found) -> Dataset:
    """The examples, in order, without copying a recording.

    Args:
        columns: further columns, (N,) values each.
        texts: text records, one for each example.
        clips: clip records, a different one for each example.

    Returns: Dataset of N rows: `columns`, text_ids, and memory-mapped num_samples, mel, mel_cuts, mel_codes.
    """
    assert len(set(clips.rows.tolist())) == len(clips.rows), "two examples share a recording"
    small = pa.table({**columns, "text_ids": texts.records.data.column("text_ids").take(pa.array(texts.rows))})
    # Beside every stored clip stand the columns of its example, or nulls; the examples are a selection of these rows.
    example_of = np.full(len(clips.records), -1)
    example_of[clips.rows] = np.arange(len(clips.rows))
    beside = Dataset(small.take(pa.array(example_of, mask=example_of < 0)))
    stored = clips.records.select_columns(["num_samples", *EncodedClip._fields])
    return concatenate_datasets([beside, stored], axis=1).select(clips.rows)
