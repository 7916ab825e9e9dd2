"""What a DVAE is trained on: the log-mels of a dataset's clips, and the pieces of them that make a batch.

A code of a real clip has heard what the encoder reaches: the convolutions' padding where the clip begins, digital
silence where it has ended, else its neighbours. A piece is encoded together with as much of its clip as that, so each
of its codes is the one that preparation computes for the whole clip (see `ClipEncoder.encode`).
"""

# B pieces · W codes of a piece · F mel frames

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from tortoise_hf.audio import LOG_FLOOR, NUM_MEL_BINS, SAMPLE_RATE, num_codes
from tortoise_hf.config import DataConfig
from tortoise_hf.data.check import DatasetReport
from tortoise_hf.data.examples import CLIPS_VERSION, MEL_FEATURES, MelReader
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.prepare import Rows, encode_clips, least_samples
from tortoise_hf.models.dvae import FRAMES_PER_CODE

SILENCE = math.log(LOG_FLOOR)
"""Log-mel of digital silence."""
LARGEST_NORM = -2.0
"""Measured norms are at most this, so that quiet frames stay positive and loud bins don't drown the others."""


class ClipMels:
    """Log-mels of clips, not normalised, on disk and memory-mapped."""

    def __init__(self, clip_ids: list[str], paths: list[str], records: Dataset) -> None:
        """Take the clips with their records (see `MelReader`), in the same order."""
        self.clip_ids, self.paths = clip_ids, paths
        self._mels = records.select_columns(["mel"]).with_format("arrow")
        self.num_codes = np.array([num_codes(count) for count in records["num_samples"]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def __getitem__(self, index: int) -> np.ndarray:
        """(F, 80) float16, up to the first frame that hears only the silence behind the clip."""
        return self._mels[index]["mel"][0].values.to_numpy().reshape(-1, NUM_MEL_BINS)

    def cut(self, index: int, first_code: int, count: int) -> torch.Tensor:
        """(80, 4 count) float32 frames of the codes from `first_code` on, silence where the clip has ended."""
        part = self[index][first_code * FRAMES_PER_CODE : (first_code + count) * FRAMES_PER_CODE]
        frames = torch.full((NUM_MEL_BINS, count * FRAMES_PER_CODE), SILENCE)
        frames[:, : len(part)] = torch.from_numpy(part.T.astype(np.float32))
        return frames


@dataclass(frozen=True)
class PreparedMels:
    """A dataset a DVAE can be trained on."""

    train: ClipMels
    eval: ClipMels
    """May be empty."""
    report: DatasetReport


def prepare_mels(cfg: DataConfig, show_progress: bool = True) -> PreparedMels:
    """Read, check and split a dataset as `prepare_dataset` does, but without a tokenizer: any text will do.

    Log-mels computed before are taken from the cache.

    Raises:
        UserError: if the data can't be read, no clip is usable, or a file is missing and `cfg.missing` is error.
    """
    raw = read_rows(cfg)
    rows = Rows(raw)
    if cfg.missing == "error":
        rows.refuse_missing_files()
    rows.drop_what_the_reader_marked()
    reader = MelReader(least_samples(cfg), cfg.max_samples)
    settings = {"version": CLIPS_VERSION, "mel": "log-mel, not normalised"}
    clips = encode_clips(rows, cfg, reader, settings, MEL_FEATURES, show_progress)
    rows.drop_clips(clips, reader.min_samples, reader.max_samples)
    rows.report.require_kept()

    kept, report = rows.kept(), rows.report
    records = clips.records.select(clips.rows[kept])
    seconds = [count / SAMPLE_RATE for count in records["num_samples"]]
    train, held_out = rows.split(cfg, [rows.texts[row] for row in kept], seconds)
    report.count_kept(seconds, [rows.speakers[row] for row in kept])
    report.num_train, report.num_eval = len(train), len(held_out)
    if report.num_train == 0:
        report.refuse("none is left to train on, only clips of the evaluation list")
    if report.num_eval == 0:
        report.warnings.append("there is no clip to evaluate on, so nothing will show when training has gone too far.")

    def take(chosen: np.ndarray) -> ClipMels:
        chosen_rows = kept[chosen]
        return ClipMels(
            [rows.clip_ids[r] for r in chosen_rows], [rows.paths[r] for r in chosen_rows], records.select(chosen)
        )

    return PreparedMels(take(train), take(held_out), report)


def measure_mel_norms(log_mels: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean log-mel of every bin over all frames, at most -2.

    The released norms are all negative too: the log-mel is divided by them (nothing is subtracted), which makes quiet
    frames positive.

    Args:
        log_mels: (80, F) each, not normalised.

    Returns: (80,) float32, all negative.
    """
    total, frames = torch.zeros(NUM_MEL_BINS, dtype=torch.float64), 0
    for log_mel in log_mels:
        total += log_mel.double().sum(dim=1)
        frames += log_mel.shape[1]
    return (total / frames).clamp(max=LARGEST_NORM).float()


@dataclass
class Pieces:
    """One process's share of a batch."""

    log_mel: torch.Tensor
    """(B, 80, 4 (W + 2 reach)): the piece with what the encoder hears around it."""
    first: torch.Tensor
    """(B,) int64, code of `log_mel` with which the piece begins: 0 where its clip begins, else the encoder's reach."""
    valid: torch.Tensor
    """(B, W) bool, False behind the end of a clip that is shorter than a piece."""
    num_valid: int
    """Valid codes of the whole batch, over all processes."""

    def to(self, device: torch.device) -> Pieces:
        """The same on another device."""
        return Pieces(self.log_mel.to(device), self.first.to(device), self.valid.to(device), self.num_valid)

    def codes_of_piece(self, values: torch.Tensor) -> torch.Tensor:
        """Those columns of the encoder's output that belong to the piece: (B, dim, W + 2 reach) to (B, dim, W)."""
        columns = self.first[:, None] + torch.arange(self.valid.shape[1], device=values.device)
        return values.gather(2, columns[:, None].expand(-1, values.shape[1], -1))

    def target(self) -> torch.Tensor:
        """(B, 80, 4 W) log-mel of the piece alone."""
        width = self.valid.shape[1] * FRAMES_PER_CODE
        frames = self.first[:, None] * FRAMES_PER_CODE + torch.arange(width, device=self.first.device)
        return self.log_mel.gather(2, frames[:, None].expand(-1, NUM_MEL_BINS, -1))


@dataclass(frozen=True)
class PieceDraws:
    """Draws batches; a batch is a function of seed and number, so a resumed run goes on with the ones to come."""

    mels: ClipMels
    batch_size: int
    """Pieces per batch, over all processes."""
    piece_codes: int
    reach: int
    """Codes an encoder output hears to either side."""
    seed: int

    def __call__(self, number: int, process_index: int = 0, num_processes: int = 1) -> Pieces:
        """Every n-th piece of a batch.

        All moments of speech are equally likely to be in a piece, up to both ends of a clip: pieces that would reach
        beyond them are moved to the end they cross, so many begin and end as clips do.
        """
        rng = np.random.default_rng([self.seed, number])
        counts, width = self.mels.num_codes, self.piece_codes
        clips = rng.choice(len(counts), self.batch_size, p=counts / counts.sum())
        starts = rng.integers(1 - width, counts[clips])
        starts = np.clip(starts, 0, np.maximum(0, counts[clips] - width))
        lengths = np.minimum(width, counts[clips] - starts)
        mine = slice(process_index, None, num_processes)
        first = np.minimum(starts, self.reach)
        span = width + 2 * self.reach
        parts = [
            self.mels.cut(int(clip), int(start), span)
            for clip, start in zip(clips[mine], (starts - first)[mine], strict=True)
        ]
        valid = np.arange(width) < lengths[mine, None]
        return Pieces(torch.stack(parts), torch.from_numpy(first[mine]), torch.from_numpy(valid), int(lengths.sum()))
