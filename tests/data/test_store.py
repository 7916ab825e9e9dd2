"""The store of computed records: found again, crash-safe, and never silently wrong."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from datasets import Features, List, Value

from tortoise_hf.data import store as store_module
from tortoise_hf.data.store import ShardStore, fill, make_key
from tortoise_hf.errors import UserError

FEATURES = Features({"name": Value("string"), "values": List(Value("float16"))})


def records(*names: str) -> list[dict]:
    return [{"key": name, "name": name.upper(), "values": np.arange(len(name))} for name in names]


def names_of(store: ShardStore, keys: list[str]) -> list[str | None]:
    found = store.find(keys)
    return [None if row < 0 else found.records[int(row)]["name"] for row in found.rows]


def make_upper(keys: list[str], items: list[str]):
    for key, item in zip(keys, items, strict=True):
        yield {"key": key, "name": item.upper(), "values": [1.5, 2.5]}


def die_at_the_second_batch(keys: list[str], items: list[str]):
    if "item-20" in items:
        os._exit(9)
    return make_upper(keys, items)


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path / "store", FEATURES)


def test_records_come_back(store):
    store.write(records("a", "bb"))
    store.write(records("ccc"))
    found = store.find(["ccc", "nothing", "a"])
    assert found.rows[1] == -1
    assert found.records[int(found.rows[0])] == {"key": "ccc", "name": "CCC", "values": [0, 1, 2]}
    assert found.records[int(found.rows[2])]["values"] == [0]


def test_an_empty_store_has_nothing(store):
    found = store.find(["a"])
    assert found.records is None
    assert found.rows.tolist() == [-1]


def test_shards_without_a_wanted_record_are_left_out(store):
    store.write(records("old", "older"))
    store.write(records("new"))
    assert len(store.find(["new"]).records) == 1


def test_a_record_stored_twice_is_one(store):
    store.write(records("a", "b"))
    store.write(records("b", "c"))
    assert names_of(store, ["a", "b", "c"]) == ["A", "B", "C"]


def test_a_failing_write_leaves_nothing(store):
    def fail_half_way():
        yield from records(*(f"r{i}" for i in range(40)))
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        store.write(fail_half_way())
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "emptied", "garbage of the same size"])
def test_a_damaged_shard_is_noticed_removed_and_made_again(store, damage, caplog):
    store.write(records("a", "b"))
    (broken,) = store.folder.iterdir()
    store.write(records("c"))
    content = broken.read_bytes()
    broken.write_bytes(
        {"truncated": content[: len(content) // 2], "emptied": b"", "garbage of the same size": b"x" * len(content)}[
            damage
        ]
    )
    with caplog.at_level(logging.WARNING):
        assert names_of(store, ["a", "b", "c"]) == [None, None, "C"]
    assert "damaged" in caplog.text
    assert broken.name in caplog.text
    assert not broken.exists()
    store.write(records("a", "b"))
    assert names_of(store, ["a", "b", "c"]) == ["A", "B", "C"]


def test_fill_computes_and_stores(store):
    keys = [f"k{i}" for i in range(40)]
    fill(store, keys, [f"item-{i}" for i in range(40)], make_upper, "Testing", show_progress=False)
    assert names_of(store, keys) == [f"ITEM-{i}" for i in range(40)]
    assert len(list(store.folder.iterdir())) == 3


def test_fill_with_two_processes(store):
    keys = [f"k{i}" for i in range(64)]
    items = [f"item-{i}" for i in range(64)]
    fill(store, keys, items, make_upper, "Testing", num_proc=2, show_progress=False)
    assert names_of(store, keys) == [item.upper() for item in items]


def test_very_many_records_come_in_few_shards(store, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_SHARDS_PER_RUN", 4)
    keys = [f"k{i}" for i in range(200)]
    fill(store, keys, keys, make_upper, "Testing", show_progress=False)
    assert len(list(store.folder.iterdir())) == 4


def test_what_a_killed_run_finished_is_kept(store):
    items = [f"item-{i}" for i in range(40)]
    arguments = (store, items, items, die_at_the_second_batch, "Testing")
    run = multiprocessing.get_context("fork").Process(target=fill, args=arguments, kwargs={"show_progress": False})
    run.start()
    run.join()
    assert run.exitcode == 9
    assert [row >= 0 for row in store.find(items).rows] == [True] * 16 + [False] * 24


def test_a_dying_process_is_told_to_the_user(store):
    items = [f"item-{i}" for i in range(40)]
    with pytest.raises(UserError, match=r"process died.*kept.*data\.num_proc"):
        fill(store, items, items, die_at_the_second_batch, "Testing", num_proc=2, show_progress=False)
    assert names_of(store, items[:16]) == [item.upper() for item in items[:16]]


def test_orphans_of_killed_runs_go_when_they_are_old(store):
    store.folder.mkdir()
    old, fresh = store.folder / "tmp-1-a.arrow", store.folder / "tmp-2-b.arrow"
    for path in (old, fresh):
        path.touch()
    os.utime(old, (0, 0))
    store.remove_orphans()
    assert [path.name for path in store.folder.iterdir()] == [fresh.name]


def test_keys_tell_parts_apart():
    assert make_key("ab", "c") != make_key("a", "bc")
    assert make_key(1, 2) == make_key("1", "2")
    assert make_key("\udcff") != make_key("")  # a file name that isn't UTF-8


def test_a_store_travels_to_worker_processes(store):
    store.write(records("a"))
    assert names_of(pickle.loads(pickle.dumps(store)), ["a"]) == ["A"]
