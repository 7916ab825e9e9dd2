"""Which recordings a training row is conditioned on: other clips of the same speaker, drawn anew in every epoch.

A voice speaks with reference clips that say something else, so training must not show the GPT the clip it predicts. The
draw is a pure function of seed, epoch and clip (of the group of clips, where some share theirs): runs repeat, and
neither the number of processes nor of loader workers changes what a row hears.
"""

# K conditioning clips · F mel frames

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tortoise_hf.audio import CUT_FRAMES, HOP_LENGTH, MIRRORED_FRAMES, NUM_MEL_BINS, SAMPLE_RATE, silent_frame

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from tortoise_hf.data.sampler import Draw


class ConditioningDraws:
    """Draws windows of other clips of the same speaker."""

    def __init__(
        self,
        examples: Dataset,
        mel_norms: torch.Tensor,
        num_clips: int = 2,
        seconds: float = 6.0,
        seed: int = 0,
        pool: Dataset | None = None,
    ) -> None:
        """Sort the clips by speaker.

        Args:
            examples: prepared examples; `draw.index` counts its rows.
            mel_norms: (80,) per-bin norms the mels were divided by.
            num_clips: windows per row, K.
            seconds: length of a window. Source of the default: 132 300 samples at 22 050 Hz in tortoise-tts.
            seed: of the draws.
            pool: more clips to draw from, for instance the training clips when `examples` are for evaluation.
        """
        self.num_clips = num_clips
        self.num_samples = round(seconds * SAMPLE_RATE)
        self.num_frames = self.num_samples // HOP_LENGTH + 1
        self.seed = seed
        self._silence = silent_frame(mel_norms.float()).numpy()
        sources = [examples] if pool is None else [examples, pool]
        columns = ["num_samples", "mel", "mel_cuts"]
        self._sources = [source.select_columns(columns).with_format("arrow") for source in sources]
        self._num_own = len(examples)
        names = [source.select_columns(["speaker", "clip_id"])[:] for source in sources]
        speakers = [speaker for one in names for speaker in one["speaker"]]
        clip_ids = [clip_id for one in names for clip_id in one["clip_id"]]
        # Clips are told apart by id, not by row: the pool may hold an evaluation clip a second time.
        _, self._identity = np.unique(clip_ids, return_inverse=True)
        _, self._speaker = np.unique(speakers, return_inverse=True)
        by_speaker = np.argsort(self._speaker, kind="stable")
        self._members = np.split(by_speaker, np.cumsum(np.bincount(self._speaker))[:-1])

    def choose(self, draw: Draw) -> tuple[np.ndarray, np.random.Generator]:
        """Rows of the clips a row is conditioned on (pool rows count on from the examples), and the rest of its chance.

        They differ from each other where the speaker has enough clips; the row's own only if there is no other.
        """
        sharing = self.sharing(draw)
        rng = np.random.default_rng([self.seed, draw.epoch, sharing[0]])
        others = self._others(sharing)
        if len(others) == 0:
            others = np.array([draw.index])
        return rng.choice(others, self.num_clips, replace=len(others) < self.num_clips), rng

    def sharing(self, draw: Draw) -> list[int]:
        """Rows that hear what this one hears: those of its group with the same speaker, or it alone.

        It is alone if the speaker hasn't enough clips that none of them says.
        """
        speaker = self._speaker[draw.index]
        mates = [row for row in draw.group if self._speaker[row] == speaker]
        return mates if len(mates) > 1 and len(self._others(mates)) >= self.num_clips else [draw.index]

    def _others(self, rows: list[int]) -> np.ndarray:
        """Rows of the same speaker that none of these is."""
        members = self._members[self._speaker[rows[0]]]
        return members[~np.isin(self._identity[members], self._identity[rows])]

    def __call__(self, draw: Draw) -> np.ndarray:
        """Conditioning mels of one row.

        Returns: (K, 80, F) float32 normalised log-mel, to within float16 what the front end gives for the waveform: of
            a clip longer than the window a random part, a shorter one with zeros behind it. Only the last two frames of
            a part hear what follows it in the clip instead of its end mirrored; the encoder doesn't answer there.
        """
        rows, rng = self.choose(draw)
        return np.stack([self._window(int(row), rng) for row in rows])

    def _window(self, row: int, rng: np.random.Generator) -> np.ndarray:
        source, row = (self._sources[0], row) if row < self._num_own else (self._sources[1], row - self._num_own)
        # Arrow hands out the memory-mapped values themselves; only the window is read and converted.
        table = source[row]
        mel = table["mel"][0].values.to_numpy().reshape(-1, NUM_MEL_BINS)
        spare_samples = table["num_samples"][0].as_py() - self.num_samples
        cut = int(rng.integers(max(0, spare_samples) // (CUT_FRAMES * HOP_LENGTH) + 1))
        first = cut * CUT_FRAMES
        part = mel[first : first + self.num_frames]
        window = np.empty((NUM_MEL_BINS, self.num_frames), dtype=np.float32)
        window[:, : len(part)] = part.T
        window[:, len(part) :] = self._silence[:, None]
        cuts = table["mel_cuts"][0].values.to_numpy().reshape(-1, MIRRORED_FRAMES, NUM_MEL_BINS)
        window[:, :MIRRORED_FRAMES] = cuts[cut].T
        return window
