"""A growing store of computed records, each filed under a key that names all it was computed from.

`datasets`' own cache holds the result of a whole `map` or nothing: one changed file or a killed run and everything is
computed again. Here each batch of a `map` writes its records into an Arrow file of its own (a shard), at once and under
its final name only when complete. So a killed run goes on where it stopped, a new clip costs one clip, and several
processes may fill one store: records under one key are equal, whoever wrote them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.table import MemoryMappedTable, Table, concat_tables

from tortoise_hf.errors import UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]

MAX_SHARDS_PER_RUN = 256
"""Shards one `fill` writes, about, however many records there are: opening one takes a millisecond."""
ORPHAN_SECONDS = 24 * 3600
"""Age at which an unfinished shard surely belongs to a killed run."""
_RECORDS_PER_WRITE = 16


def make_key(*parts: object) -> str:
    """Hash of what a record is computed from: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = str(part).encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(text) + text)
    return digest.hexdigest()


@dataclass(frozen=True)
class Found:
    """Answer of a look-up."""

    records: Dataset | None
    """All records of the shards that hold a wanted one, memory-mapped; None if there is none."""
    rows: np.ndarray
    """(N,) row of `records` for each key asked for, -1 where nothing is stored."""


class ShardStore:
    """Records in a folder of Arrow files. Can be pickled."""

    def __init__(self, folder: str | Path, features: Features) -> None:
        """Open or begin a store.

        Args:
            folder: made when something is written. Its name should name the settings all records share.
            features: columns of a record besides `key`.
        """
        self.folder = Path(folder)
        self.features = Features({"key": Value("string"), **features})

    def find(self, keys: Iterable[str]) -> Found:
        """Look records up. Reads the keys of all shards and nothing else.

        A shard that is damaged is removed, with a line in the log.
        """
        keys = list(keys)
        wanted = set(keys)
        row_of: dict[str, int] = {}
        tables: list[Table] = []
        num_rows = 0
        for path in sorted(self.folder.glob("shard-*.arrow")):
            shard = self._open(path)
            if shard is None:
                continue
            stored = shard.column("key").to_pylist()
            if wanted.isdisjoint(stored):
                continue
            for row, key in enumerate(stored, start=num_rows):
                row_of.setdefault(key, row)
            tables.append(shard)
            num_rows += len(stored)
        rows = np.array([row_of.get(key, -1) for key in keys], dtype=np.int64)
        # Straight from the tables: a Dataset of each shard would take milliseconds to make up its fingerprint.
        records = Dataset(concat_tables(tables), fingerprint=uuid.uuid4().hex) if tables else None
        return Found(records, rows)

    def write(self, records: Iterable[Record]) -> None:
        """Write a shard; it appears complete or not at all. `records` are dicts with `key` and all features."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"tmp-{os.getpid()}-{uuid.uuid4().hex}.arrow"
        schema = self.features.arrow_schema
        records, num_records = iter(records), 0
        try:
            with temporary.open("wb") as file:
                with pa.ipc.new_stream(file, schema) as writer:
                    while part := list(islice(records, _RECORDS_PER_WRITE)):
                        writer.write_batch(_to_arrow(part, schema))
                        num_records += len(part)
                file.flush()
                os.fsync(file.fileno())
            if num_records:
                # The name says how long the file has to be: cut off by a full disk, it is noticed.
                size = temporary.stat().st_size
                temporary.rename(self.folder / f"shard-{time.time_ns()}-{uuid.uuid4().hex[:8]}-{size}.arrow")
        finally:
            temporary.unlink(missing_ok=True)

    def remove_orphans(self) -> None:
        """Delete what killed runs left half-written."""
        for path in self.folder.glob("tmp-*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ORPHAN_SECONDS:
                    path.unlink()

    def _open(self, path: Path) -> Table | None:
        try:
            size = path.stat().st_size
            problem = "" if path.stem.endswith(f"-{size}") else f"it has {size:,} bytes"
            if not problem:
                return MemoryMappedTable.from_file(str(path))
        except FileNotFoundError:  # another process found it damaged first
            return None
        except (pa.ArrowException, ValueError) as error:
            problem = str(error)
        logger.warning("The cached examples in %s are damaged (%s); they are made again.", path, problem)
        path.unlink(missing_ok=True)
        return None


def _to_arrow(records: Sequence[Record], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([_to_column([record[f.name] for record in records], f.type) for f in schema], schema=schema)


def _to_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    # Through one flat array: Arrow would otherwise look at every float as a Python object.
    flat = np.concatenate([np.asarray(value).reshape(-1) for value in values])
    offsets = np.cumsum([0, *(np.size(value) for value in values)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat).cast(kind.value_type))


def fill(
    store: ShardStore,
    keys: Sequence[str],
    items: Sequence[str],
    make_records: Callable[[list[str], list[str]], Iterable[Record]],
    desc: str,
    batch_size: int = 16,
    num_proc: int = 1,
    show_progress: bool = True,
) -> None:
    """Compute records and store them, batch by batch, with a progress bar.

    Args:
        store: where they go.
        keys: N different keys.
        items: (N,) what each record is made of.
        make_records: makes the records of a few items, given their keys and the items. With several processes it is
            pickled once for each.
        desc: what the progress bar says.
        batch_size: fewest records of a shard; with very many items it is more.
        num_proc: processes that share the work.
        show_progress: show the progress bar.

    Raises:
        UserError: if a process died, or the store's folder can't be written.
    """
    store.remove_orphans()
    batch_size = max(batch_size, -(-len(keys) // MAX_SHARDS_PER_RUN))
    num_proc = min(num_proc, -(-len(keys) // batch_size))
    rows = Dataset.from_dict({"key": list(keys), "item": list(items)})
    with _progress_bars(show_progress):
        try:
            rows.map(
                _WriteShard(store, make_records),
                batched=True,
                batch_size=batch_size,
                num_proc=num_proc if num_proc > 1 else None,
                remove_columns=["item"],
                new_fingerprint=uuid.uuid4().hex,  # the result is on disk already; nothing may be taken for it
                desc=desc,
            )
        except OSError as error:
            raise UserError(
                f"{error.filename or store.folder} can't be written ({error.strerror or error}); make room on that "
                "disk, or choose another place with --data.cache_dir. What is finished is kept."
            ) from error
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            raise UserError(
                f"A process died while it prepared examples ({desc}), most likely because memory ran out. What it "
                "finished is kept: run again, with a lower data.num_proc."
            ) from error


@dataclass
class _WriteShard:
    """The function `map` calls."""

    store: ShardStore
    make_records: Callable[[list[str], list[str]], Iterable[Record]]

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[str]]:
        self.store.write(self.make_records(batch["key"], batch["item"]))
        return {"key": batch["key"]}


@contextlib.contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    shown_before = not datasets.are_progress_bars_disabled()
    if shown_before and not show:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown_before and not show:
            datasets.enable_progress_bars()
