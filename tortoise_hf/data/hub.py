"""Read a Hub dataset with an audio and a text column into rows.

Recordings are written once into the cache, named by the hash of their bytes, so later steps see ordinary files. A
journal beside them remembers what was read: reading needs the memory of one batch, a killed run goes on where it
stopped, and a second run reads nothing. Audio is never decoded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import huggingface_hub
from datasets import Audio, Dataset, DatasetBuilder, IterableDataset
from datasets.utils.file_utils import xopen
from filelock import FileLock
from tqdm.auto import tqdm

from tortoise_hf.config import DataConfig
from tortoise_hf.data.discover import AUDIO_EXTENSIONS
from tortoise_hf.data.rows import RawData, Row, mark_clips_held_out, rows_to_dataset
from tortoise_hf.errors import UserError

TEXT_COLUMNS = ("normalized_text", "text_normalized", "text", "sentence", "transcription", "transcript")
"""Columns taken for the transcript when none is named, in this order."""
RAW_TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "text_original")
"""The same where data.metadata_text is raw."""
ID_COLUMNS = ("id", "clip_id", "utterance_id")
"""Columns that name a clip; without one its file name does."""
JOURNAL_VERSION = 1
"""Raise it when rows are made differently, so that older journals are read anew."""
_ROWS_PER_ENTRY = 64
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def is_hub_id(root: str) -> bool:
    """Whether `root` has the form owner/name or owner/name@revision and isn't a path below an existing folder."""
    return bool(_HUB_ID.fullmatch(root)) and not Path(root.partition("/")[0]).exists()


def read_hub_rows(cfg: DataConfig) -> RawData:
    """Read the splits data.split and data.eval_split of a Hub dataset, or of a local folder of its Parquet files.

    Args:
        cfg: `root` is owner/name, owner/name@revision, or an absolute folder.

    Raises:
        UserError: if the dataset can't be reached, or lacks a split or a column.
    """
    if cfg.eval_split == cfg.split:
        raise UserError(
            f"data.split and data.eval_split are both {cfg.split!r}; leave data.eval_split out and clips are split off."
        )
    builder = _load_builder(cfg.root)
    train = _HubSplit(builder, cfg, cfg.split).read()
    held_out = None if cfg.eval_split is None else _HubSplit(builder, cfg, cfg.eval_split).read()
    if held_out is not None:
        mark_clips_held_out(train, held_out)
    splits = cfg.split if cfg.eval_split is None else f"{cfg.split} and {cfg.eval_split}"
    return RawData(
        train=rows_to_dataset(train),
        eval=None if held_out is None else rows_to_dataset(held_out),
        root=None,
        source=f"{cfg.root} ({splits})",
    )


def fetch_loose_files(cfg: DataConfig) -> Path | None:
    """Download a Hub dataset that is a plain folder of recordings and lists; None if it is made of Parquet files.

    The `datasets` library reads such folders only with a system FFmpeg; `ljspeech.py` reads them like any folder.
    """
    if type(_load_builder(cfg.root)).__name__ != "AudioFolder":
        return None
    name, _, revision = cfg.root.partition("@")
    folder = Path(cfg.cache_dir).expanduser() / "hub" / "folders" / re.sub(r"[^A-Za-z0-9._-]+", "_", cfg.root)
    try:
        return Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision or None, local_dir=folder)
        )
    except Exception as error:
        raise UserError(f"{cfg.root} can't be downloaded ({_first_line(error)}); {_advice(error)}.") from error


def _load_builder(root: str) -> DatasetBuilder:
    path, _, revision = (root, "", "") if os.path.isabs(root) else root.partition("@")
    try:
        return datasets.load_dataset_builder(path, revision=revision or None)
    except Exception as error:  # the library raises whatever its transport or file format does
        message = _first_line(error)
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            advice = "check the spelling, or log in with `hf auth login` if it is private or gated"
        elif isinstance(error, ConnectionError):
            advice = "check the network, or give a folder on this machine"
        elif "scripts are no longer supported" in message:
            advice = f"try the Hub's own conversion with data.root {path}@refs/convert/parquet"
        else:
            advice = "expected Parquet files with an audio and a text column"
        raise UserError(
            f"data.root: {root} is no folder here ({Path(path).absolute()}) and can't be opened as a dataset on the "
            f"Hub ({message}); {advice}."
        ) from error


class _HubSplit:
    """One split of a Hub dataset and the journal of what was read of it."""

    def __init__(self, builder: DatasetBuilder, cfg: DataConfig, split: str) -> None:
        self.builder = builder
        self.cfg = cfg
        self.split = split
        self.list_name = split if os.path.isabs(cfg.root) else f"{cfg.root} {split}"
        cache = Path(cfg.cache_dir).expanduser() / "hub"
        self.audio_dir = cache / "audio"
        # The builder's folder is named by the dataset, its subset, its version and the hash of its commit or files.
        key = [JOURNAL_VERSION, *Path(builder.cache_dir).parts[-4:], split, cfg.audio_column, cfg.text_column]
        key += [cfg.speaker_column, cfg.metadata_text, cfg.allow_outside]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{Path(cfg.root).name}-{split}")[:60]
        self.journal = cache / f"{name}-{digest}.jsonl"

    def read(self) -> list[Row]:
        """Rows of the whole split."""
        self.audio_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.journal}.lock"):
            rows, state, done = self._recall()
            if not done:
                rows += self._read_on(len(rows), state)
        if not rows:
            raise UserError(f"{self.list_name} holds no rows; choose another split with --data.split.")
        return rows

    def _recall(self) -> tuple[list[Row], dict | None, bool]:
        """(rows, where to go on, whether that is all) as far as the journal and the files it speaks of are whole."""
        rows: list[Row] = []
        state, done, whole_bytes = None, False, 0
        if not self.journal.exists():
            return rows, state, done
        with self.journal.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # the run was killed while it wrote this entry
                entry_rows = [Row(**{**row, "list_name": self.list_name}) for row in entry["rows"]]
                if any(row.audio_path and not os.path.exists(row.audio_path) for row in entry_rows):
                    done = False
                    break
                rows += entry_rows
                state, done, whole_bytes = entry["state"], entry["done"], whole_bytes + len(line)
        if not done:
            os.truncate(self.journal, whole_bytes)
        return rows, state, done

    def _read_on(self, num_read: int, state: dict | None) -> list[Row]:
        """Rows after the first `num_read`, each kept in the journal as soon as its recording is on disk."""
        try:
            dataset, columns, total = self._open(num_read, state)
        except UserError:
            raise
        except Exception as error:  # the library raises whatever its transport or file format does
            raise UserError(f"{self.list_name} can't be read ({_first_line(error)}); {_advice(error)}.") from error
        rows: list[Row] = []
        pending: list[Row] = []
        with (
            self.journal.open("ab") as journal,
            tqdm(desc=f"Reading {self.list_name}", unit="clip", initial=num_read, total=total, delay=1) as progress,
        ):
            examples = iter(dataset)
            while True:
                try:
                    example = next(examples, None)
                except Exception as error:
                    raise UserError(
                        f"{self.list_name} can't be read after row {num_read + len(rows)} ({_first_line(error)}); run "
                        "again to go on from there."
                    ) from error
                if example is not None:
                    pending.append(self._row(example, num_read + len(rows) + 1, columns))
                    rows.append(pending[-1])
                    progress.update()
                if example is None or len(pending) == _ROWS_PER_ENTRY:
                    journal.write(_entry(pending, dataset, done=example is None))
                    journal.flush()
                    pending = []
                if example is None:
                    return rows

    def _open(self, num_read: int, state: dict | None) -> tuple[Dataset | IterableDataset, dict[str, str], int | None]:
        """(examples not read yet, columns by role, number of all examples if known)."""
        # A folder of Parquet files is here already; an Arrow copy of it would only take room.
        if self.cfg.streaming or os.path.isabs(self.cfg.root):
            dataset = self.builder.as_streaming_dataset(split=self.split)
            known = (self.builder.info.splits or {}).get(self.split)
            total = known.num_examples if known else None
        else:
            self.builder.download_and_prepare()
            dataset = self.builder.as_dataset(split=self.split)
            total = len(dataset)
        features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
        columns = self._columns(features)
        dataset = dataset.select_columns(sorted(set(columns.values())))
        if isinstance(features[columns["audio"]], Audio):
            dataset = dataset.cast_column(columns["audio"], Audio(decode=False))
        if isinstance(dataset, Dataset):
            dataset = dataset.select(range(num_read, len(dataset)))
        elif state is not None:
            dataset.load_state_dict(state)
        elif num_read:
            dataset = dataset.skip(num_read)
        return dataset, columns, total

    def _columns(self, features: dict[str, Any]) -> dict[str, str]:
        """Column of each role: audio, text, and speaker and id if there is one."""
        wanted = TEXT_COLUMNS if self.cfg.metadata_text == "normalized" else RAW_TEXT_COLUMNS + TEXT_COLUMNS
        columns = {
            "audio": self.cfg.audio_column,
            "text": self.cfg.text_column or next((name for name in wanted if name in features), None),
        }
        if self.cfg.speaker_column is not None:
            columns["speaker"] = self.cfg.speaker_column
        for role, name in columns.items():
            if name not in features:
                found = f"no column {name}" if name else "no column that is known to hold transcripts"
                raise UserError(
                    f"{self.list_name} has {found}; its columns are {', '.join(features)}. Name the right one with "
                    f"--data.{role}_column."
                )
        name = next((name for name in ID_COLUMNS if name in features), None)
        return columns if name is None else {**columns, "id": name}

    def _row(self, example: dict[str, Any], number: int, columns: dict[str, str]) -> Row:
        def words(role: str) -> str:
            value = example.get(columns.get(role, ""))
            return "" if value is None else str(value).strip()

        audio = example[columns["audio"]]
        if isinstance(audio, bytes):
            audio = {"bytes": audio, "path": None}
        row = Row("", words("text"), words("speaker"), "", number, self.list_name)
        if audio is None or not isinstance(audio, dict) or "bytes" not in audio:
            row.clip_id = words("id") or str(number)
            found = "nothing" if audio is None else type(audio).__name__
            row.problem = "missing_file" if audio is None else "malformed"
            row.detail = f"column {columns['audio']} holds {found}, expected a recording"
            return row
        path = audio.get("path") or ""
        # A file name alone is no id (many a dataset calls every file audio.wav), so the row number tells them apart.
        stem = PurePosixPath(path.replace("\\", "/")).stem
        row.clip_id = words("id") or (f"{number}-{stem}" if stem else str(number))
        data = audio["bytes"]
        if data is None and path:
            data, row.problem, row.detail = self._read_file(path)
        elif data is None:
            row.problem, row.detail = "missing_file", f"column {columns['audio']} holds neither bytes nor a path"
        if data is not None:
            row.audio_path = str(self._store(data, path))
        return row

    def _read_file(self, path: str) -> tuple[bytes | None, str, str]:
        """(bytes, problem, detail) of a recording the dataset only points to."""
        if path.split("::")[-1].startswith("hf://"):
            with xopen(path, "rb") as file:
                return file.read(), "", ""
        # Someone else wrote this path: only what the library fetched itself, or what lies in the folder, is opened.
        real = os.path.realpath(path)
        homes = [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, self.builder.cache_dir]
        homes += [self.cfg.root] if os.path.isabs(self.cfg.root) else []
        inside = any(real.startswith(os.path.join(os.path.realpath(home), "")) for home in homes)
        if not inside and not self.cfg.allow_outside:
            return None, "outside_folder", f"it points to {path}, outside the dataset"
        try:
            return Path(real).read_bytes(), "", ""
        except OSError:
            return None, "missing_file", f"{path} is missing"

    def _store(self, data: bytes, path: str) -> Path:
        """Write a recording under the hash of its bytes, unless it is there."""
        digest = hashlib.sha256(data).hexdigest()
        target = self.audio_dir / digest[:2] / (digest + _extension(data, path))
        if not target.exists() or target.stat().st_size != len(data):
            target.parent.mkdir(exist_ok=True)
            staging = target.with_name(f".{digest}.{os.getpid()}")
            staging.write_bytes(data)
            staging.replace(target)
        return target.resolve()


def _entry(rows: list[Row], dataset: Dataset | IterableDataset, done: bool) -> bytes:
    entry = {"rows": [asdict(row) for row in rows], "state": None, "done": done}
    if isinstance(dataset, IterableDataset):
        try:
            return json.dumps({**entry, "state": dataset.state_dict()}).encode() + b"\n"
        except TypeError:
            pass  # a position that isn't plain data: going on will skip over the rows instead
    return json.dumps(entry).encode() + b"\n"


def _extension(data: bytes, path: str) -> str:
    for start, extension in ((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"ID3", ".mp3")):
        if data.startswith(start):
            return extension
    written = PurePosixPath(path).suffix.lower()
    if written in AUDIO_EXTENSIONS:
        return written
    # A bare MPEG stream starts with eleven set bits.
    return ".mp3" if data[:1] == b"\xff" and data[1:2] >= b"\xe0" else ".bin"


def _advice(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "check the network and run again; what was fetched is kept"
    if "split" in str(error).lower():
        return "choose another split with --data.split or --data.eval_split"
    return "expected a dataset with an audio and a text column"


def _first_line(error: BaseException) -> str:
    # The library wraps what really happened ("An error occurred while generating the dataset").
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
