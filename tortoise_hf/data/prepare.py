"""From a dataset on disk to examples ready for training, with one report of what was left out.

The order of the checks is the order of cost: first what the reader saw, then the texts, and only recordings whose text
is usable are decoded. All that was computed is kept; a second run only asks the file system whether anything changed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Dataset, Features

from tortoise_hf.audio import SAMPLE_RATE, num_codes
from tortoise_hf.config import DataConfig
from tortoise_hf.data.check import DatasetReport, RowProblem
from tortoise_hf.data.examples import (
    CLIP_FEATURES,
    CLIPS_VERSION,
    RESAMPLER,
    TEXT_FEATURES,
    TEXTS_VERSION,
    ClipEncoder,
    ClipReader,
    TextEncoder,
    clip_key,
    join_examples,
)
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.rows import RawData
from tortoise_hf.data.sampler import count_positions
from tortoise_hf.data.split import split_rows
from tortoise_hf.data.store import Found, ShardStore, fill, make_key
from tortoise_hf.errors import UserError
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.text import TextTokenizer


@dataclass(frozen=True)
class Prepared:
    """A dataset ready for training.

    Columns of the examples: clip_id, speaker, text (as written), audio_path (of the recording, which may be gone by the
    time somebody looks), num_positions (see `count_positions`), text_ids, num_samples (at 22 050 Hz), and mel, mel_cuts
    and mel_codes as in `EncodedClip`, flattened.
    """

    train: Dataset
    eval: Dataset
    """May be empty."""
    report: DatasetReport


def prepare_dataset(
    cfg: DataConfig,
    tokenizer: TextTokenizer,
    mel_norms: torch.Tensor,
    dvae: DVAE | Callable[[], DVAE],
    dvae_fingerprint: str,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
    raw: RawData | None = None,
) -> Prepared:
    """Read, check, encode and split a dataset; what was encoded before is taken from the cache.

    Args:
        cfg: which data, and its limits.
        tokenizer: text to ids.
        mel_norms: (80,) divisors of the mel spectrogram.
        dvae: mel to codes; the module, or a function that loads it, which isn't called when nothing has to be encoded.
            With `cfg.num_proc` above 1 give a function that can be pickled.
        dvae_fingerprint: sha256 of the DVAE's weights.
        device: where to encode; anything but the CPU does it in one process.
        show_progress: show progress bars.
        raw: the rows, if they have been read already.

    Raises:
        UserError: if the data can't be read, no clip is usable, or a file is missing and `cfg.missing` is error.
    """
    raw = raw or read_rows(cfg)
    rows = Rows(raw)
    if cfg.missing == "error":
        rows.refuse_missing_files()
    rows.drop_what_the_reader_marked()
    texts = _encode_texts(rows, cfg, tokenizer, show_progress)
    rows.drop_texts(texts, cfg.max_text_ids)
    min_samples = least_samples(cfg)
    encoder = ClipEncoder(dvae, mel_norms, min_samples, cfg.max_samples, device)
    settings = {
        "version": CLIPS_VERSION,
        "dvae": dvae_fingerprint,
        "mel_norms": make_key(encoder.mel_norms.float().numpy().tobytes().hex()),
    }
    clips = encode_clips(rows, cfg, encoder, settings, CLIP_FEATURES, show_progress)
    rows.drop_clips(clips, min_samples, cfg.max_samples)
    rows.report.require_kept()
    return _finish(rows, cfg, texts, clips)


def look_over(cfg: DataConfig, raw: RawData) -> str:
    """What can be said of a folder's recordings without a base: which are there and open, and how long they are.

    Texts, which take its tokenizer, and what lies behind the recordings' headers are left to `prepare_dataset`.
    """
    rows = Rows(raw)
    rows.drop_what_the_reader_marked()
    seconds = {}
    for row in rows.kept():
        path = rows.paths[row]
        try:
            seconds[row] = soundfile.info(path).duration
        except (soundfile.LibsndfileError, OSError):
            rows.drop(row, "unreadable", f"{path} can't be opened as a recording")
            continue
        if seconds[row] < cfg.min_seconds:
            rows.drop(row, "too_short", f"{seconds[row]:.2f} s, at least {cfg.min_seconds:.2f} s are kept")
        elif seconds[row] > cfg.max_samples / SAMPLE_RATE:
            rows.drop(row, "too_long", f"{seconds[row]:.2f} s, at most {cfg.max_samples / SAMPLE_RATE:.2f} s are kept")
    kept, report = rows.kept(), rows.report
    report.count_kept([seconds[row] for row in kept], [rows.speakers[row] for row in kept])
    head = f"{report.source}: at first sight {report.kept:,} of {report.total:,} clips ({report.minutes:.1f} minutes)."
    return "\n".join([head, *report.summary().splitlines()[1:]])


def least_samples(cfg: DataConfig) -> int:
    """Samples at 22 050 Hz of the shortest clip kept."""
    return math.ceil(cfg.min_seconds * SAMPLE_RATE - 1e-6)  # 0.6 s are 13 230 samples, not 13 231


class Rows:
    """All rows of all lists, which of them are still in the race, and the report of those that aren't."""

    def __init__(self, raw: RawData) -> None:
        parts = [raw.train] if raw.eval is None else [raw.train, raw.eval]
        lists = [part[:] for part in parts]
        self.root = raw.root
        columns = {name: [value for one in lists for value in one[name]] for name in raw.train.column_names}
        self.clip_ids, self.texts, self.speakers = columns["clip_id"], columns["text"], columns["speaker"]
        self.paths, self.numbers, self.lists = columns["audio_path"], columns["row"], columns["list_name"]
        self.problems, self.details = columns["problem"], columns["detail"]
        self.has_eval_list = raw.eval is not None
        self.held_out = np.arange(len(self.texts)) >= len(raw.train)
        self.alive = np.ones(len(self.texts), dtype=bool)
        self.report = DatasetReport(
            source=raw.source, total=len(self.texts), row_word="row" if raw.root is None else "line"
        )

    def kept(self) -> np.ndarray:
        """Rows still in the race."""
        return np.flatnonzero(self.alive)

    def split(self, cfg: DataConfig, texts: Sequence[str], seconds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """(training, evaluation) positions among the kept rows, given their texts and durations."""
        if self.has_eval_list:
            held_out = self.held_out[self.kept()]
            return np.flatnonzero(~held_out), np.flatnonzero(held_out)
        train, held_out = split_rows(
            texts,
            seconds,
            eval_fraction=cfg.eval_fraction,
            min_clips=cfg.min_eval_clips,
            max_clips=cfg.max_eval_clips,
        )
        return np.array(train, dtype=np.int64), np.array(held_out, dtype=np.int64)

    def where(self, row: int) -> str:
        """Where a row stands, in words."""
        return f"{self.lists[row]} {self.report.row_word} {self.numbers[row]}"

    def drop(self, row: int, reason: str, detail: str) -> None:
        """Leave a row out and report why."""
        self.alive[row] = False
        self.report.drop(reason, RowProblem(self.lists[row], self.numbers[row], self.clip_ids[row], detail))

    def refuse_missing_files(self) -> None:
        """Stop if a recording isn't there.

        Raises: UserError: naming the first.
        """
        missing = [row for row, problem in enumerate(self.problems) if problem == "missing_file"]
        if missing:
            row, total = missing[0], self.report.total
            raise UserError(
                f"{self.where(row)} ({self.clip_ids[row]}): {self.details[row]}; {total - len(missing):,} of {total:,} "
                "clips were found. Extract the archive again, or leave such lines out with --data.missing skip."
            )

    def drop_what_the_reader_marked(self) -> None:
        """Leave out rows without a usable recording or text, and doubles."""
        seen: dict[tuple[bool, str, str], int] = {}
        for row, (problem, detail) in enumerate(zip(self.problems, self.details, strict=True)):
            if problem:
                self.drop(row, problem, detail)
                continue
            for kind, value in (("clip id", self.clip_ids[row]), ("recording", self.paths[row])):
                first = seen.setdefault((bool(self.held_out[row]), kind, value), row)
                if first != row:
                    self.drop(row, "duplicate_id", f"has the {kind} of {self.where(first)}")
                    break
            else:
                if not self.texts[row].strip():
                    self.drop(row, "empty_text", "has no text")

    def drop_texts(self, texts: Found, max_text_ids: int) -> None:
        """Leave out rows whose text can't be used."""
        if texts.records is None:
            return
        table = texts.records.data
        lengths = np.asarray(table.column("text_ids").combine_chunks().value_lengths())
        unknown = table.column("unknown").to_pylist()
        for row, record in zip(self.kept(), texts.rows[self.alive], strict=True):
            if unknown[record]:
                self.drop(row, "unknown_characters", f"the text holds {unknown[record]}")
            elif lengths[record] == 0:
                self.drop(row, "empty_text", f"nothing of the text {self.texts[row]!r} can be spoken")
            elif lengths[record] > max_text_ids:
                self.drop(row, "too_many_text_ids", f"{lengths[record]} text ids, at most {max_text_ids} are kept")

    def drop_clips(self, clips: Found, min_samples: int, max_samples: int) -> None:
        """Leave out rows whose recording can't be used or is too short or too long."""
        kept = self.kept()
        if clips.records is not None:
            table = clips.records.data
            statuses, details = table.column("status").to_pylist(), table.column("detail").to_pylist()
            num_samples = table.column("num_samples").to_numpy()
        for row, record in zip(kept, clips.rows[kept], strict=True):
            path = self.paths[row]
            if record < 0:
                self.drop(row, "unreadable", f"{path} {_why_unreadable(path)}")
            elif statuses[record] not in ("ok", "skipped"):
                reason = "unreadable" if statuses[record] == "empty" else statuses[record]
                self.drop(row, reason, f"{path}: {details[record]}")
            elif num_samples[record] < min_samples:
                found, least = num_samples[record] / SAMPLE_RATE, min_samples / SAMPLE_RATE
                self.drop(row, "too_short", f"{found:.2f} s, at least {least:.2f} s are kept")
            elif num_samples[record] > max_samples:
                found, most = num_samples[record] / SAMPLE_RATE, max_samples / SAMPLE_RATE
                self.drop(row, "too_long", f"{found:.2f} s, at most {most:.2f} s are kept")


def _encode_texts(rows: Rows, cfg: DataConfig, tokenizer: TextTokenizer, show_progress: bool) -> Found:
    """Text records of all rows (-1 for rows that are out already)."""
    name = make_key(TEXTS_VERSION, tokenizer.fingerprint, rows.root or cfg.root)
    store = ShardStore(Path(cfg.cache_dir).expanduser() / "texts" / name, TEXT_FEATURES)
    keys = [make_key(rows.texts[row]) if alive else "" for row, alive in enumerate(rows.alive)]
    found = store.find(keys)
    missing = {keys[row]: rows.texts[row] for row in rows.kept() if found.rows[row] < 0}
    if missing:
        fill(
            store,
            list(missing),
            list(missing.values()),
            TextEncoder(tokenizer),
            "Tokenising",
            batch_size=1000,
            show_progress=show_progress,
        )
        found = store.find(keys)
    return found


def encode_clips(
    rows: Rows, cfg: DataConfig, reader: ClipReader, settings: dict[str, Any], features: Features, show_progress: bool
) -> Found:
    """Clip records of all rows (-1 for rows that are out already, and for files that can't be opened).

    Args:
        rows: those still in the race are encoded, if they aren't stored yet.
        cfg: where the store lies, and how many processes fill it.
        reader: makes the records.
        settings: all that the records of every clip are made with; they name the store.
        features: columns of a record; the store of each kind lies in a folder of its own.
        show_progress: show a progress bar.
    """
    settings = {**settings, "resampler": RESAMPLER, "root": str(rows.root or cfg.root)}
    kind = "clips" if features == CLIP_FEATURES else "mels"
    folder = Path(cfg.cache_dir).expanduser() / kind / make_key(*settings.values())
    store = ShardStore(folder, features)
    keys = [_key_or_none(rows.paths[row]) if alive else "" for row, alive in enumerate(rows.alive)]
    found = _find_clips(store, reader, keys)
    missing = {keys[row]: rows.paths[row] for row in rows.kept() if keys[row] and found.rows[row] < 0}
    if missing:
        num_proc = cfg.num_proc if torch.device(reader.device).type == "cpu" else 1
        fill(
            store,
            list(missing),
            list(missing.values()),
            reader,
            "Encoding clips",
            num_proc=num_proc,
            show_progress=show_progress,
        )
        if folder.is_dir():  # for people: what this folder's name stands for
            (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        found = _find_clips(store, reader, keys)
    return found


def _find_clips(store: ShardStore, reader: ClipReader, keys: Sequence[str]) -> Found:
    """Records of the clips, or the notes that they are outside the limits."""
    both = store.find([*keys, *(reader.skipped_key(key) for key in keys)])
    records, notes = np.split(both.rows, 2)
    return Found(both.records, np.where(records >= 0, records, notes))


def _key_or_none(path: str) -> str:
    try:
        return clip_key(path)
    except OSError:  # it was there when the list was read
        return ""


def _why_unreadable(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return "changed while it was read; run again"


def _finish(rows: Rows, cfg: DataConfig, texts: Found, clips: Found) -> Prepared:
    """Put the kept rows together, split them, complete the report."""
    kept, report = rows.kept(), rows.report
    texts, clips = Found(texts.records, texts.rows[kept]), Found(clips.records, clips.rows[kept])
    cleaned = texts.records.data.column("cleaned").take(texts.rows).to_pylist()
    num_text_ids = texts.records.data.column("text_ids").combine_chunks().value_lengths().to_numpy()[texts.rows]
    num_samples = clips.records.data.column("num_samples").to_numpy()[clips.rows]
    speakers = [rows.speakers[row] for row in kept]
    columns = {
        "clip_id": [rows.clip_ids[row] for row in kept],
        "speaker": speakers,
        "text": [rows.texts[row] for row in kept],
        "audio_path": [rows.paths[row] for row in kept],
        "num_positions": count_positions(num_text_ids, num_codes(num_samples)),
    }
    examples = join_examples(columns, texts, clips)
    seconds = (num_samples / SAMPLE_RATE).tolist()
    train, held_out = rows.split(cfg, cleaned, seconds)
    if rows.has_eval_list:
        _warn_of_shared_texts(report, [cleaned[i] for i in train], [cleaned[i] for i in held_out])
    report.count_kept(seconds, speakers)
    report.num_train, report.num_eval = len(train), len(held_out)
    if report.num_train == 0:
        report.refuse("none is left to train on, only clips of the evaluation list")
    report.num_self_conditioned = _count_lonely([speakers[i] for i in train], [speakers[i] for i in held_out])
    _warn_of_small_sets(report)
    return Prepared(examples.select(train), examples.select(held_out), report)


def _warn_of_shared_texts(report: DatasetReport, train: Sequence[str], held_out: Sequence[str]) -> None:
    known = set(train)
    shared = [text for text in held_out if text in known]
    if shared:
        report.warnings.append(
            f"{len(shared):,} of {len(held_out):,} evaluation clips say what a training clip says as well (the first: "
            f"{shared[0][:60]!r}), so the evaluation loss will look better than it is."
        )


def _count_lonely(train_speakers: Sequence[str], eval_speakers: Sequence[str]) -> int:
    """Clips without another one of their speaker: for training among the training clips, else among all."""
    in_train = Counter(train_speakers)
    in_all = in_train + Counter(eval_speakers)
    return sum(in_train[speaker] == 1 for speaker in train_speakers) + sum(in_all[s] == 1 for s in eval_speakers)


def _warn_of_small_sets(report: DatasetReport) -> None:
    if report.num_eval == 0:
        report.warnings.append("there is no clip to evaluate on, so nothing will show when training has gone too far.")
    if report.num_self_conditioned:
        report.warnings.append(
            f"clips without another clip of their speaker: {report.num_self_conditioned:,}; they are conditioned on "
            "themselves, which teaches the model to copy rather than to speak. Record more clips of these speakers."
        )
