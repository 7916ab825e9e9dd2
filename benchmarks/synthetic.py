"""Data in the shape of LJSpeech, without its recordings: lengths, prepared examples, and a folder of noise to prepare.

What a step costs depends on the lengths alone; end_to_end.py is the benchmark that hears speech.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch

from tortoise_hf.audio import CUT_FRAMES, HOP_LENGTH, MIRRORED_FRAMES, NUM_MEL_BINS, SAMPLE_RATE, num_codes
from tortoise_hf.data.examples import CLIP_FEATURES, TEXT_FEATURES, join_examples, num_frames
from tortoise_hf.data.sampler import count_positions
from tortoise_hf.data.store import Record, ShardStore

LJSPEECH_CLIPS = 13_100
SHORTEST, MEAN, LONGEST = 1.11, 6.57, 10.1
"""Seconds of a clip. Source: the statistics on LJSpeech's page."""
SPREAD = 2.2
"""Standard deviation, in seconds. The page doesn't tell it: chosen so that most clips are long, as LJSpeech's are."""
CHARACTERS_PER_SECOND = 15.2
"""Source: 1,308,678 characters in 23:55:17 on the same page; 100 for the mean clip."""
TEXT_IDS_PER_CHARACTER = 0.63
"""Measured with the released tokenizer on plain English sentences; 63 ids for the mean clip."""
WORDS = re.findall(
    r"\w+",
    "the kettle is on so sit down and tell me about your day please close gate behind you or sheep will wander onto "
    "road we painted kitchen a pale yellow now it looks twice as big seven boats left harbour before rain fell",
)
_CLIPS_PER_SHARD = 256


@dataclass(frozen=True)
class Shapes:
    """Lengths of N clips."""

    num_samples: np.ndarray
    """(N,) at 22,050 Hz."""
    num_text_ids: np.ndarray
    """(N,) without START and STOP."""

    @property
    def seconds(self) -> float:
        """Of all clips together."""
        return float(self.num_samples.sum()) / SAMPLE_RATE


def ljspeech_shapes(num_clips: int, seed: int = 0) -> Shapes:
    """Lengths like LJSpeech's: a beta distribution with its shortest, mean and longest clip."""
    rng = np.random.default_rng(seed)
    width = LONGEST - SHORTEST
    mean, variance = (MEAN - SHORTEST) / width, (SPREAD / width) ** 2
    total = mean * (1 - mean) / variance - 1
    seconds = SHORTEST + width * rng.beta(mean * total, (1 - mean) * total, num_clips)
    speed = rng.normal(1, 0.1, num_clips).clip(0.7, 1.3)
    text_ids = np.rint(seconds * speed * CHARACTERS_PER_SECOND * TEXT_IDS_PER_CHARACTER).astype(np.int64)
    return Shapes((seconds * SAMPLE_RATE).astype(np.int64), text_ids.clip(1, 200))


def prepared_examples(
    folder: Path, shapes: Shapes, num_text_tokens: int = 255, num_mel_codes: int = 8192, seed: int = 0
) -> datasets.Dataset:
    """Examples of random ids, codes and mels, stored and memory-mapped as prepared ones are (see `prepare_dataset`).

    Args:
        folder: where the stores are made.
        shapes: lengths of the clips.
        num_text_tokens: ids below this are drawn.
        num_mel_codes: codes below this are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    keys = [f"{index:06d}" for index in range(len(shapes.num_samples))]

    def clip(key: str, samples: int) -> Record:
        frames, cuts = num_frames(samples), max(1, samples // (CUT_FRAMES * HOP_LENGTH))
        return {
            "key": key,
            "status": "ok",
            "detail": "",
            "num_samples": samples,
            "mel": rng.standard_normal((frames, NUM_MEL_BINS), dtype=np.float32).astype(np.float16),
            "mel_cuts": rng.standard_normal((cuts, MIRRORED_FRAMES, NUM_MEL_BINS), dtype=np.float32).astype(np.float16),
            "mel_codes": rng.integers(0, num_mel_codes, num_codes(samples)).astype(np.int16),
        }

    def text(key: str, count: int) -> Record:
        ids = rng.integers(2, num_text_tokens, count).astype(np.int16)
        return {"key": key, "cleaned": "", "unknown": "", "text_ids": ids}

    clips, texts = ShardStore(folder / "clips", CLIP_FEATURES), ShardStore(folder / "texts", TEXT_FEATURES)
    texts.write(text(key, int(count)) for key, count in zip(keys, shapes.num_text_ids, strict=True))
    for start in range(0, len(keys), _CLIPS_PER_SHARD):
        part = slice(start, start + _CLIPS_PER_SHARD)
        clips.write(clip(key, int(count)) for key, count in zip(keys[part], shapes.num_samples[part], strict=True))
    return open_prepared(folder, shapes)


def open_prepared(folder: Path, shapes: Shapes) -> datasets.Dataset:
    """The examples that `prepared_examples` stored there."""
    keys = [f"{index:06d}" for index in range(len(shapes.num_samples))]
    clips, texts = ShardStore(folder / "clips", CLIP_FEATURES), ShardStore(folder / "texts", TEXT_FEATURES)
    columns = {
        "clip_id": keys,
        "speaker": ["one"] * len(keys),
        "text": [""] * len(keys),
        "audio_path": [""] * len(keys),
        "num_positions": count_positions(shapes.num_text_ids, num_codes(shapes.num_samples)),
    }
    return join_examples(columns, texts.find(keys), clips.find(keys))


def write_raw_folder(folder: Path, shapes: Shapes, sample_rate: int = SAMPLE_RATE, seed: int = 0) -> None:
    """An LJSpeech folder of such clips: metadata.csv, and noise with the rhythm of syllables under wavs/."""
    (folder / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(2 * int(LONGEST * sample_rate)).astype(np.float32)
    lines = []
    for index, (samples, count) in enumerate(zip(shapes.num_samples, shapes.num_text_ids, strict=True)):
        length = int(samples) * sample_rate // SAMPLE_RATE
        start = int(rng.integers(len(noise) - length))
        rhythm = np.sin(np.arange(length, dtype=np.float32) * np.float32(4 * np.pi / sample_rate)) ** 2
        soundfile.write(
            folder / "wavs" / f"s{index:06d}.wav", 0.1 * rhythm * noise[start : start + length], sample_rate
        )
        lines.append(f"s{index:06d}|{' '.join(_sentence(rng, int(count / TEXT_IDS_PER_CHARACTER)))}.\n")
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")


def _sentence(rng: np.random.Generator, num_characters: int) -> Iterator[str]:
    while num_characters > 0:
        word = WORDS[rng.integers(len(WORDS))]
        num_characters -= len(word) + 1
        yield word


def random_norms() -> torch.Tensor:
    """(80,) norms of a mel front end for whoever has no released ones: negative, as they are."""
    return torch.full((NUM_MEL_BINS,), -4.0)
