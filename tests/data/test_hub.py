"""Hub datasets become files and rows; folders of Parquet files stand for the Hub here."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from tortoise_hf.config import DataConfig
from tortoise_hf.data import hub
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.rows import ROW_FEATURES
from tortoise_hf.errors import UserError

NUM_CLIPS = 150


def audio_bytes(number: int, file_format: str = "WAV") -> bytes:
    """A short recording; every number gives other bytes."""
    waveform = np.random.default_rng(number).normal(size=400) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, 22_050, format=file_format)
    return buffer.getvalue()


def examples(num_clips: int = NUM_CLIPS) -> list[dict]:
    return [
        {
            "id": f"LJ{number:03d}",
            "audio": {"bytes": audio_bytes(number), "path": f"LJ{number:03d}.wav"},
            "file": f"wavs/LJ{number:03d}.wav",
            "text": f"Raw {number}.",
            "normalized_text": f"Words {number}.",
        }
        for number in range(num_clips)
    ]


def write_parquet(folder: Path, rows: list[dict], split: str = "train", num_files: int = 2, typed: bool = True) -> Path:
    """Parquet files as `push_to_hub` makes them; `typed`: the audio column is marked as such."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(num_files):
        dataset = datasets.Dataset.from_list(rows[part * len(rows) // num_files : (part + 1) * len(rows) // num_files])
        if typed:
            dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
        # Small row groups, so that a position in the middle of a file can be told.
        dataset.to_parquet(folder / f"{split}-{part:05d}-of-{num_files:05d}.parquet", batch_size=20)
    return folder


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def on_the_hub(monkeypatch):
    """Makes the id owner/voice lead to a local folder of Parquet files."""

    def publish(folder: Path) -> str:
        real = datasets.load_dataset_builder

        def load(path, revision=None):
            assert path == "owner/voice"
            return real(str(folder), cache_dir=str(folder.parent / "hf"))

        monkeypatch.setattr(hub.datasets, "load_dataset_builder", load)
        return "owner/voice"

    return publish


def read(root, tmp_path: Path, **settings):
    return read_rows(DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), **settings))


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("form", ["map", "streaming", "folder"])
def test_rows_of_all_ways_are_equal(tmp_path, on_the_hub, form, typed):
    folder = write_parquet(tmp_path / "voice" / "data", examples(), typed=typed).parent
    root = folder if form == "folder" else on_the_hub(folder)
    raw = read(root, tmp_path, streaming=form == "streaming")
    assert raw.train.features == ROW_FEATURES
    assert raw.train["clip_id"] == [f"LJ{number:03d}" for number in range(NUM_CLIPS)]
    assert raw.train["text"] == [f"Words {number}." for number in range(NUM_CLIPS)]
    assert raw.train["row"] == list(range(1, NUM_CLIPS + 1))
    assert set(raw.train["problem"]) == {""}
    assert raw.train["list_name"][0] == ("train" if form == "folder" else "owner/voice train")
    for number in (0, 77, NUM_CLIPS - 1):
        assert Path(raw.train["audio_path"][number]).read_bytes() == audio_bytes(number)
    assert raw.eval is None
    assert raw.root is None


@pytest.mark.parametrize("streaming", [False, True])
def test_second_run_reads_nothing(tmp_path, on_the_hub, monkeypatch, streaming):
    root = on_the_hub(write_parquet(tmp_path / "voice", examples()))
    first = read(root, tmp_path, streaming=streaming).train
    monkeypatch.setattr(hub._HubSplit, "_open", lambda *args: pytest.fail("read a second time"))
    times = [os.stat(path).st_mtime_ns for path in first["audio_path"]]
    again = read(root, tmp_path, streaming=streaming).train
    assert again.to_list() == first.to_list()
    assert [os.stat(path).st_mtime_ns for path in again["audio_path"]] == times


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, on_the_hub, monkeypatch, streaming, torn):
    root = on_the_hub(write_parquet(tmp_path / "voice", examples()))
    stored = []
    real = hub._HubSplit._store

    def store(self, data, path):
        stored.append(path)
        if len(stored) == 100:
            raise KeyboardInterrupt
        return real(self, data, path)

    with monkeypatch.context() as patch:
        patch.setattr(hub._HubSplit, "_store", store)
        with pytest.raises(KeyboardInterrupt):
            read(root, tmp_path, streaming=streaming)
    if torn:
        (journal,) = (tmp_path / "cache" / "hub").glob("*.jsonl")
        with journal.open("ab") as file:
            file.write(b'{"rows": [{"clip_')
    stored.clear()
    monkeypatch.setattr(hub._HubSplit, "_store", lambda self, *args: (stored.append(args[1]), real(self, *args))[1])
    rows = read(root, tmp_path, streaming=streaming).train
    assert rows["clip_id"] == [f"LJ{number:03d}" for number in range(NUM_CLIPS)]
    assert rows["row"] == list(range(1, NUM_CLIPS + 1))
    assert [Path(path).read_bytes() for path in rows["audio_path"]] == [audio_bytes(n) for n in range(NUM_CLIPS)]
    # The journal is written every 64 rows.
    assert stored == [f"LJ{number:03d}.wav" for number in range(64, NUM_CLIPS)]
    monkeypatch.setattr(hub._HubSplit, "_open", lambda *args: pytest.fail("read a third time"))
    assert read(root, tmp_path, streaming=streaming).train.to_list() == rows.to_list()


def test_a_position_that_cant_be_kept_is_skipped_to(tmp_path, on_the_hub, monkeypatch):
    root = on_the_hub(write_parquet(tmp_path / "voice", examples()))
    first = read(root, tmp_path, streaming=True).train.to_list()
    (journal,) = (tmp_path / "cache" / "hub").glob("*.jsonl")
    entry = json.loads(journal.read_bytes().split(b"\n")[0])
    journal.write_text(json.dumps({**entry, "state": None}) + "\n")
    assert read(root, tmp_path, streaming=True).train.to_list() == first


def test_recordings_deleted_from_the_cache_are_written_again(tmp_path):
    folder = write_parquet(tmp_path / "voice", examples())
    first = read(folder, tmp_path).train
    for number in (10, 100):
        os.unlink(first["audio_path"][number])
    again = read(folder, tmp_path).train
    assert again.to_list() == first.to_list()
    assert Path(first["audio_path"][100]).read_bytes() == audio_bytes(100)


def test_a_changed_dataset_is_read_anew_but_recordings_are_kept(tmp_path):
    folder = write_parquet(tmp_path / "voice", examples(20), num_files=1)
    first = read(folder, tmp_path).train
    time = os.stat(first["audio_path"][0]).st_mtime_ns
    os.unlink(folder / "train-00000-of-00001.parquet")
    changed = examples(20)
    changed[3]["normalized_text"] = "Other words."
    os.utime(write_parquet(folder, changed, num_files=1) / "train-00000-of-00001.parquet", (9, 9))
    rows = read(folder, tmp_path).train
    assert rows["text"][3] == "Other words."
    assert rows["audio_path"] == first["audio_path"]
    assert os.stat(first["audio_path"][0]).st_mtime_ns == time


def test_formats_are_told_from_the_bytes(tmp_path):
    formats = ["WAV", "FLAC", "OGG", "MP3"]
    rows = [{"audio": {"bytes": audio_bytes(0, name), "path": None}, "text": "x"} for name in formats]
    rows.append({"audio": {"bytes": b"no audio", "path": "a.flac"}, "text": "x"})
    rows.append({"audio": {"bytes": b"no audio either", "path": "a.exe"}, "text": "x"})
    paths = read(write_parquet(tmp_path / "voice", rows, num_files=1), tmp_path).train["audio_path"]
    assert [Path(path).suffix for path in paths] == [".wav", ".flac", ".ogg", ".mp3", ".flac", ".bin"]


def test_columns_speakers_and_splits_can_be_named(tmp_path):
    rows = [
        {"sound": {"bytes": audio_bytes(n), "path": "audio.wav"}, "words": f" w{n} ", "who": n % 2} for n in range(4)
    ]
    folder = tmp_path / "voice"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(rows[2:3]).to_parquet(folder / "validation-00000-of-00001.parquet")
    raw = read(
        folder, tmp_path, audio_column="sound", text_column="words", speaker_column="who", eval_split="validation"
    )
    assert raw.train["text"] == ["w0", "w1", "w2", "w3"]
    assert raw.train["speaker"] == ["0", "1", "0", "1"]
    assert raw.train["clip_id"] == ["1-audio", "2-audio", "3-audio", "4-audio"]
    assert raw.train["problem"] == ["", "", "duplicate_id", ""]
    assert "validation line 1" in raw.train["detail"][2]
    assert raw.eval["text"] == ["w2"]


def test_raw_text_is_a_choice(tmp_path):
    folder = write_parquet(tmp_path / "voice", examples(2), num_files=1)
    assert read(folder, tmp_path).train["text"] == ["Words 0.", "Words 1."]
    assert read(folder, tmp_path, metadata_text="raw").train["text"] == ["Raw 0.", "Raw 1."]


def test_rows_without_a_recording_stay_rows(tmp_path):
    outside = tmp_path / "outside.wav"
    outside.write_bytes(audio_bytes(0))
    folder = tmp_path / "voice"
    folder.mkdir()
    (folder / "inside.wav").write_bytes(audio_bytes(1))
    audio = [
        {"bytes": audio_bytes(2), "path": "a.wav"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": str(folder / "gone.wav")},
        {"bytes": None, "path": str(outside)},
        {"bytes": None, "path": str(folder / "inside.wav")},
    ]
    write_parquet(folder, [{"audio": value, "text": None} for value in audio], num_files=1)
    rows = read(folder, tmp_path).train
    assert rows["problem"] == ["", "missing_file", "missing_file", "missing_file", "outside_folder", ""]
    assert rows["text"] == [""] * 6
    assert Path(rows["audio_path"][5]).read_bytes() == audio_bytes(1)
    assert str(outside) in rows["detail"][4]
    allowed = read(folder, tmp_path, allow_outside=True).train
    assert Path(allowed["audio_path"][4]).read_bytes() == audio_bytes(0)


def test_wrong_settings_say_what_is_there(tmp_path):
    folder = write_parquet(tmp_path / "voice", examples(2), num_files=1)
    for settings, message in (
        ({"audio_column": "sound"}, "no column sound; its columns are .*id.*--data.audio_column"),
        ({"text_column": "words"}, "no column words; its columns are .*normalized_text.*--data.text_column"),
        ({"speaker_column": "who"}, "no column who.*--data.speaker_column"),
        ({"split": "training"}, r"training.*train.*--data\.split"),
        ({"eval_split": "validation"}, r"validation.*--data\.eval_split"),
        ({"eval_split": "train"}, "are both 'train'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read(folder, tmp_path, **settings)
        assert "\n" not in str(caught.value)


def test_an_audio_column_of_words_is_refused_row_by_row(tmp_path):
    folder = tmp_path / "voice"
    folder.mkdir()
    datasets.Dataset.from_list([{"audio": "a.wav", "text": "x"}]).to_parquet(folder / "train.parquet")
    rows = read(folder, tmp_path).train
    assert rows["problem"] == ["malformed"]
    assert "holds str, expected a recording" in rows["detail"][0]


def test_bytes_alone_are_a_recording(tmp_path):
    folder = tmp_path / "voice"
    folder.mkdir()
    datasets.Dataset.from_list([{"audio": audio_bytes(0), "text": "x"}]).to_parquet(folder / "train.parquet")
    assert Path(read(folder, tmp_path).train["audio_path"][0]).read_bytes() == audio_bytes(0)


@pytest.mark.parametrize(
    "error, advice",
    [
        (ConnectionError("Couldn't reach it"), "check the network"),
        (datasets.exceptions.DatasetNotFoundError("It doesn't exist"), "check the spelling.*hf auth login"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "owner/voice@refs/convert/parquet"),
        (ValueError("Config name is missing.\nPick one"), "Config name is missing"),
    ],
)
def test_datasets_that_cant_be_opened_say_what_to_do(tmp_path, monkeypatch, error, advice):
    def fail(path, revision=None):
        raise error

    monkeypatch.setattr(hub.datasets, "load_dataset_builder", fail)
    with pytest.raises(UserError, match=advice) as caught:
        read("owner/voice", tmp_path)
    assert "owner/voice is no folder here" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_connection_lost_on_the_way_says_to_run_again(tmp_path, on_the_hub, monkeypatch):
    root = on_the_hub(write_parquet(tmp_path / "voice", examples()))
    real = datasets.IterableDataset.__iter__

    def lose(self):
        for number, example in enumerate(real(self)):
            if number == 70:
                raise ConnectionError("gone")
            yield example

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "__iter__", lose)
        with pytest.raises(UserError, match=r"after row 70 \(gone\); run again"):
            read(root, tmp_path, streaming=True)
    assert len(read(root, tmp_path, streaming=True).train) == NUM_CLIPS


def test_revision_and_loose_files(tmp_path, monkeypatch):
    asked = {}

    class AudioFolder:
        pass

    def load(path, revision=None):
        asked["builder"] = (path, revision)
        return AudioFolder()

    def download(name, repo_type, revision, local_dir):
        asked["download"] = (name, repo_type, revision)
        (local_dir / "data").mkdir(parents=True)
        (local_dir / "README.md").write_text("card")
        (local_dir / "data" / "a.wav").write_bytes(audio_bytes(0))
        (local_dir / "data" / "metadata.csv").write_text('file_name,transcription\na.wav,"Well, yes."\n')
        return str(local_dir)

    monkeypatch.setattr(hub.datasets, "load_dataset_builder", load)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    rows = read("owner/voice@main", tmp_path).train
    assert asked == {"builder": ("owner/voice", "main"), "download": ("owner/voice", "dataset", "main")}
    assert (rows["clip_id"], rows["text"], rows["problem"]) == (["a"], ["Well, yes."], [""])


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    assert hub.is_hub_id("keithito/lj_speech")
    assert hub.is_hub_id("owner/name@refs/convert/parquet")
    for path in ("examples/demo_vioce", "./owner/name", "/owner/name", "~/name", "name", "a/b/c", "../owner/name"):
        assert not hub.is_hub_id(path)
