"""Archives are unpacked once, whole, and never outside their folder."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tortoise_hf.config import DataConfig
from tortoise_hf.data import archive as archive_module
from tortoise_hf.data.archive import is_archive, unpack
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.errors import UserError

FORMATS = {".zip": "zip", ".tar": "tar", ".tar.gz": "gztar", ".tgz": "gztar", ".tar.bz2": "bztar", ".tar.xz": "xztar"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the dataset folder `voice` in it."""
    wavs = tmp_path / "source" / "voice" / "wavs"
    wavs.mkdir(parents=True)
    for name in ("a", "b"):
        soundfile.write(wavs / f"{name}.wav", np.random.default_rng(0).normal(size=2000) * 0.1, 22_050)
    (wavs / ".DS_Store").write_bytes(b"x")
    (wavs.parent / "metadata.csv").write_text("a|one|one\nb|two|two\n")
    return tmp_path / "source"


def pack(folder: Path, ending: str) -> Path:
    """An archive of the contents of `folder`, in its parent."""
    made = shutil.make_archive(str(folder.parent / "packed"), FORMATS[ending], root_dir=folder)
    target = folder.parent / f"my voice{ending}"
    Path(made).rename(target)
    return target


def read(archive: Path, **settings):
    return read_rows(DataConfig(root=str(archive), cache_dir=str(archive.parent / "cache"), **settings))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("flat", [True, False])
def test_an_archive_reads_like_its_folder(folder, ending, flat):
    archive = pack(folder / "voice" if flat else folder, ending)
    raw = read(archive)
    assert raw.train["clip_id"] == ["a", "b"]
    assert set(raw.train["problem"]) == {""}
    for path, name in zip(raw.train["audio_path"], ("a.wav", "b.wav"), strict=True):
        assert Path(path).read_bytes() == (folder / "voice" / "wavs" / name).read_bytes()
    assert raw.source == f"{archive} (metadata.csv)"
    assert raw.root.is_relative_to(archive.parent / "cache")
    assert not list(raw.root.rglob(".DS_Store"))


def test_folders_beside_the_dataset_folder_dont_matter(folder):
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "metadata.csv").write_text("x|y\n")
    (folder / "notes").mkdir()
    (folder / "README.md").write_text("hello")
    assert read(pack(folder, ".zip")).train["clip_id"] == ["a", "b"]


def test_list_named_by_the_user_is_found_below_the_top_folder(folder):
    (folder / "voice" / "mine.txt").write_text("a|one\n")
    assert read(pack(folder, ".zip"), train_list="mine.txt").train["clip_id"] == ["a"]


def test_an_archive_without_a_list_says_so(folder):
    (folder / "voice" / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"recordings but no list.*wavs/a\.wav\|"):
        read(pack(folder, ".tar"))


def test_unpacked_once_and_again_when_the_archive_changes(folder, monkeypatch):
    archive = pack(folder, ".tar.gz")
    first = read(archive).train["audio_path"]
    times = [os.stat(path).st_mtime_ns for path in first]
    with monkeypatch.context() as patch:
        patch.setattr(archive_module, "_unpack_into", lambda *args: pytest.fail("unpacked a second time"))
        assert read(archive).train["audio_path"] == first
    # Unpacked again into an emptied cache, nothing looks changed: caches keyed by mtime stay good.
    shutil.rmtree(folder.parent / "cache")
    assert read(archive).train["audio_path"] == first
    assert [os.stat(path).st_mtime_ns for path in first] == times
    os.utime(archive, (1, 1))
    assert read(archive).train["audio_path"] != first


def test_a_killed_unpacking_leaves_nothing_that_counts(folder, monkeypatch):
    archive = pack(folder, ".zip")
    cache = folder.parent / "cache"
    real = archive_module._target
    calls = []

    def stop_at_second_file(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(archive_module, "_target", stop_at_second_file)
        # As after a kill: nobody tidies up.
        patch.setattr(archive_module.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive, cache)
    assert [path.name[0] for path in (cache / "archives").iterdir() if path.is_dir()] == ["."]
    unpack(archive, cache)
    assert [path.name for path in (cache / "archives").iterdir() if path.is_dir()] == [unpack(archive, cache).name]
    assert read(archive).train["problem"] == ["", ""]


def test_several_at_once_get_one_whole_folder(folder):
    archive = pack(folder, ".tar.gz")
    places = []
    threads = [
        threading.Thread(target=lambda: places.append(unpack(archive, folder.parent / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 4
    assert len(set(places)) == 1
    assert (places[0] / "voice" / "wavs" / "b.wav").exists()


def zip_of(path: Path, *names: str, data: bytes = b"x", attributes: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = attributes
            file.writestr(info, data)
    return path


def tar_of(path: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        info.size = 1 if kind == tarfile.REGTYPE else 0
        file.addfile(info, io.BytesIO(b"x") if info.size else None)
    return path


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil", "wavs/../../../evil"])
@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_paths_out_of_the_archive_are_refused(tmp_path, name, ending):
    archive = tmp_path / f"a{ending}"
    zip_of(archive, "metadata.csv", name) if ending == ".zip" else tar_of(archive, name)
    with pytest.raises(UserError, match=r"a path that leads out of it, and is not unpacked.*unpack it yourself"):
        unpack(archive, tmp_path / "cache" / "deep" / "deeper")
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/evil").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith(".")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_refused(tmp_path, kind):
    with pytest.raises(UserError, match="'wavs', which is a link to '/etc'"):
        unpack(tar_of(tmp_path / "a.tar", "wavs", kind, "/etc"), tmp_path / "cache")


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_devices_in_a_tar_are_refused(tmp_path, kind):
    with pytest.raises(UserError, match="which is not a plain file"):
        unpack(tar_of(tmp_path / "a.tar", "pipe", kind), tmp_path / "cache")


def test_links_in_a_zip_are_refused(tmp_path):
    archive = zip_of(tmp_path / "a.zip", "wavs", data=b"/etc", attributes=0o120777 << 16)
    with pytest.raises(UserError, match="'wavs', which is a link"):
        unpack(archive, tmp_path / "cache")


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_absurd_sizes_are_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(archive_module, "ALWAYS_ALLOWED_BYTES", 2**20)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.wav").write_bytes(bytes(4 * 2**20))
    with pytest.raises(UserError, match="unpacks to over 1 MiB, far more than it should"):
        unpack(pack(tmp_path / "source", ending), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("a.wav"))


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="holds more than 3 files"):
        unpack(zip_of(tmp_path / "a.zip", *"abcd"), tmp_path / "cache")


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_archives_say_so_in_one_sentence(folder, ending, damage):
    archive = pack(folder, ending)
    data = archive.read_bytes()
    archive.write_bytes({"cut": data[: len(data) // 2], "garbage": b"garbage" * 100, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"can't be unpacked \(.+\); fetch or make it again") as caught:
        read(archive)
    assert "\n" not in str(caught.value)
    assert not [path for path in (folder.parent / "cache" / "archives").iterdir() if path.is_dir()]


def test_a_flipped_byte_is_noticed(folder):
    archive = pack(folder, ".zip")
    data = bytearray(archive.read_bytes())
    place = data.index(b"RIFF") if b"RIFF" in data else data.index(b"a.wav") + 200
    data[place + 100] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(UserError, match="can't be unpacked"):
        unpack(archive, folder.parent / "cache")


def test_names_that_are_archives():
    assert all(is_archive(Path(f"LJSpeech-1.1{ending}")) for ending in (*FORMATS, ".TAR.GZ", ".Zip"))
    assert not is_archive(Path("voice.gz"))
    assert not is_archive(Path("tar"))
