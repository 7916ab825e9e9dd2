"""Which sentences a run lets be heard."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.config import SamplesConfig


@dataclass(frozen=True)
class Sentence:
    """What is said, and the clip that says it if there is one."""

    text: str
    clip_id: str | None = None
    trained: bool = False
    """Whether the run trains on that clip."""
    audio_path: str | None = None
    mel_codes: tuple[int, ...] = ()
    seconds: float | None = None

    @property
    def max_seconds(self) -> float:
        """Where a preview is cut off. A model that hasn't learnt to stop would talk on to the end of its positions."""
        # Readers say twelve to sixteen characters a second.
        return 1.5 * self.seconds + 1 if self.seconds is not None else 2 + len(self.text) / 10

    def to_dict(self) -> dict[str, Any]:
        """What is known in the run's folder; nothing of the rest of this machine."""
        return {"text": self.text, "clip_id": self.clip_id, "trained": self.trained}


def choose_sentences(cfg: SamplesConfig, train: Dataset, held_out: Dataset) -> list[Sentence]:
    """The texts asked for, or what clips of medium length say: ones kept back, else ones trained on.

    Of several speakers, those of the one with most clips.

    Args:
        cfg: `texts` and `num_texts` are read.
        train: prepared examples.
        held_out: prepared examples, perhaps none.
    """
    if cfg.texts is not None:
        found = _find_clips(cfg.texts, train, trained=True) | _find_clips(cfg.texts, held_out, trained=False)
        return [found.get(_plain(text), Sentence(text.strip())) for text in cfg.texts]
    examples = held_out if len(held_out) else train
    columns = ("num_samples", "clip_id", "text", "speaker")
    lengths, clip_ids, texts, speakers = (list(examples[name]) for name in columns)
    speaker = Counter(train["speaker"]).most_common(1)[0][0]  # who speaks in the finished voice, see `write_clips`
    rows = [row for row, one in enumerate(speakers) if one == speaker] or list(range(len(texts)))
    medium = statistics.median(lengths[row] for row in rows)
    order = sorted(rows, key=lambda row: (abs(lengths[row] - medium), clip_ids[row]))
    rows = list({_plain(texts[row]): row for row in reversed(order)}.values())[::-1]  # of clips that say the same, one
    return [_sentence(examples, row, trained=examples is train) for row in rows[: cfg.num_texts]]


def _find_clips(wanted: Sequence[str], examples: Dataset, trained: bool) -> dict[str, Sentence]:
    keys = {_plain(text) for text in wanted}
    rows = {_plain(text): row for row, text in enumerate(examples["text"]) if _plain(text) in keys}
    return {key: _sentence(examples, row, trained) for key, row in rows.items()}


def _sentence(examples: Dataset, row: int, trained: bool) -> Sentence:
    example = examples.select_columns(["text", "clip_id", "audio_path", "mel_codes", "num_samples"])[row]
    return Sentence(
        example["text"].strip(),
        example["clip_id"],
        trained,
        example["audio_path"],
        tuple(example["mel_codes"]),
        example["num_samples"] / SAMPLE_RATE,
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
