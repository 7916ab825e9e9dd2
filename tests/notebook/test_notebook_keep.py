"""A copy of a run that it goes on from: always whole, never another run's, and no burden to Drive's trash."""

import json
import shutil
from types import SimpleNamespace

import pytest

from tortoise_hf.checkpoint import _write_manifest, complete_checkpoints
from tortoise_hf.notebook import keep
from tortoise_hf.notebook.keep import Keeper, copy_folder, restore_copy, save_copy

CONFIG = {"data": {}, "model": {"base": "x"}, "training": {"batch_size": 4}}


def make_checkpoint(run, step, best=None, size=1000):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes([step % 256]) * size)
    state = {"best_model_checkpoint": best and f"checkpoint-{best}", "global_step": step}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    _write_manifest(folder)


def make_run(run, *steps, best=None, fingerprint="abc"):
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"config": CONFIG, "data_fingerprint": fingerprint}))
    (run / "log.jsonl").write_text('{"step": 1}\n')
    (run / "samples" / "step-000000").mkdir(parents=True, exist_ok=True)
    (run / "samples" / "step-000000" / "1.wav").write_bytes(b"sound")
    for step in steps:
        make_checkpoint(run, step, best)
    return run


def save(run, drive):
    return save_copy(run, drive, run.with_suffix(".prepared"))


def restore(drive, run):
    return restore_copy(drive, run, run.with_suffix(".prepared"))


def steps_of(folder):
    return [one.step for one in complete_checkpoints(folder)]


def test_nothing_yet(tmp_path):
    assert save(tmp_path / "run", tmp_path / "drive") is None
    assert restore(tmp_path / "drive", tmp_path / "run") is None
    assert not (tmp_path / "drive").exists()


def test_newest_and_best_are_kept_and_come_back(tmp_path):
    run, drive = make_run(tmp_path / "run", 10, 20, best=10), tmp_path / "drive" / "voice"
    assert save(run, drive) == 20
    assert steps_of(drive) == [20, 10]
    shutil.rmtree(run / "checkpoint-20")
    make_checkpoint(run, 30, best=30)
    assert save(run, drive) == 30
    assert steps_of(drive) == [30]
    new = tmp_path / "new"
    assert restore(drive, new) == 30
    assert (new / "checkpoint-30" / "model.safetensors").read_bytes() == bytes([30]) * 1000
    assert (new / "samples" / "step-000000" / "1.wav").read_bytes() == b"sound"
    assert json.loads((new / "run.json").read_text())["data_fingerprint"] == "abc"
    assert restore(drive, new) is None, "what is here is as new"


def test_encoded_clips_come_along_and_recordings_do_not(tmp_path):
    run, drive = make_run(tmp_path / "run", 10), tmp_path / "drive"
    for name in ("clips/a/shard-1.arrow", "texts/b/shard-1.arrow", "archives/c/wavs/1.wav"):
        path = tmp_path / "run.prepared" / name
        path.parent.mkdir(parents=True)
        path.write_text(name)
    save(run, drive)
    restore(drive, tmp_path / "new")
    back = tmp_path / "new.prepared"
    found = sorted(path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file())
    assert found == ["clips/a/shard-1.arrow", "texts/b/shard-1.arrow"]


def test_what_goes_is_emptied_first(tmp_path, monkeypatch):
    run, drive = make_run(tmp_path / "run", 10), tmp_path / "drive"
    save(run, drive)
    shutil.rmtree(run / "checkpoint-10")
    make_checkpoint(run, 20)
    sizes = []

    def into_the_trash(folder, **_):
        if not folder.exists():
            return
        sizes.extend(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.move(folder, tmp_path / "trash")

    monkeypatch.setattr(keep, "shutil", SimpleNamespace(**{**vars(shutil), "rmtree": into_the_trash}))
    save(run, drive)
    assert sizes == [0, 0, 0]
    assert steps_of(drive) == [20]


def test_too_little_space_leaves_the_older_copy(tmp_path, monkeypatch):
    run, drive = make_run(tmp_path / "run", 10), tmp_path / "drive"
    save(run, drive)
    make_checkpoint(run, 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"has 0 MiB left and checkpoint-20 needs"):
        save(run, drive)
    assert steps_of(drive) == [10]


def test_a_copy_that_broke_off_is_no_copy(tmp_path, monkeypatch):
    run, drive = make_run(tmp_path / "run", 10), tmp_path / "drive"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ValueError, match="No space left on device"):
            save(run, drive)
    assert steps_of(drive) == []
    assert restore(drive, tmp_path / "new") is None
    assert save(run, drive) == 10
    assert not list(drive.glob(".*.tmp"))


def test_a_damaged_copy_is_noticed(tmp_path):
    run, drive = make_run(tmp_path / "run", 10, 20, best=10), tmp_path / "drive"
    save(run, drive)
    (drive / "checkpoint-20" / "model.safetensors").write_bytes(bytes(1000))
    assert restore(drive, tmp_path / "new") == 10
    (drive / "checkpoint-10" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no sound checkpoint"):
        restore(drive, tmp_path / "newer")


def test_another_run_is_left_alone(tmp_path):
    run, drive = make_run(tmp_path / "run", 10), tmp_path / "drive"
    save(run, drive)
    other = make_run(tmp_path / "other", 5, fingerprint="def")
    for work in (lambda: save(other, drive), lambda: restore(drive, other)):
        with pytest.raises(ValueError, match="holds another run than"):
            work()
    assert steps_of(drive) == [10]


def test_the_keeper_copies_while_the_run_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(keep, "SECONDS_BETWEEN_LOOKS", 0.01)
    run, drive = tmp_path / "run", tmp_path / "drive"
    keeper = Keeper(run, drive, tmp_path / "prepared")
    make_run(run, 10)
    while not keeper.state:
        pass
    assert steps_of(drive) == [10]
    make_checkpoint(run, 20)
    keeper.finish()
    assert keeper.state == f"Step 20 is kept in {drive}."


def test_the_keeper_survives_what_nobody_thought_of(tmp_path, monkeypatch):
    monkeypatch.setattr(keep, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(keep, "save_copy", lambda *_: {}["lora"])
    keeper = Keeper(make_run(tmp_path / "run", 10), tmp_path / "drive", tmp_path / "prepared")
    while not keeper.state:
        pass
    keeper.finish()
    assert keeper.state == f"Warning: copying to {tmp_path / 'drive'} failed (KeyError: 'lora')."


def test_a_copied_folder_replaces_the_one_before(tmp_path):
    for text in ("old", "new"):
        (tmp_path / text / "deep").mkdir(parents=True)
        (tmp_path / text / "deep" / f"{text}.txt").write_text(text)
        copy_folder(tmp_path / text, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there" / "deep").iterdir()] == ["new.txt"]
