"""Fetching: hashes, mirrors, caches, offline. The Hub's genuine client talks to a server on loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import time

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants

from tortoise_hf.errors import UserError
from tortoise_hf.models import released
from tortoise_hf.models.released import RELEASED, fetch_released

CONTENT = {name: f"content of {name}".encode() for name in RELEASED}


@pytest.fixture
def release(monkeypatch):
    """The released files with small contents: same names and origins, the hashes of CONTENT."""
    files = {
        name: dataclasses.replace(file, sha256=file.sha256 and hashlib.sha256(CONTENT[name]).hexdigest())
        for name, file in RELEASED.items()
    }
    monkeypatch.setattr(released, "RELEASED", files)
    return files


@pytest.fixture
def hub(release):
    with HubServer() as server:
        for name, file in release.items():
            origin = file.origins[0]
            revision = origin.revision if origin.revision != "main" else None
            server.put(origin.repo_id, origin.path, CONTENT[name], revision=revision)
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    """The client waits 23 s between its attempts to reach a server; the attempts stay, the waiting goes."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def fetch(hub, tmp_path, names=tuple(RELEASED), weights_dir=None):
    return fetch_released(names, weights_dir, cache_dir=tmp_path / "cache", endpoint=hub.url)


def test_every_file_comes_from_its_first_origin_and_is_compared(hub, tmp_path):
    fetched = fetch(hub, tmp_path)
    assert {name: file.path.read_bytes() for name, file in fetched.items()} == CONTENT
    assert {name: file.compared_with for name, file in fetched.items()} == {
        "autoregressive.pth": "hub",
        "dvae.pth": "pinned",
        "tokenizer.json": "pinned",
        "mel_norms.pth": "pinned",
    }
    assert "3704aea61678e7e468a06d8eea121dba368a798e" in fetched["dvae.pth"].origin


def test_second_fetch_downloads_nothing(hub, tmp_path):
    fetch(hub, tmp_path)
    hub.requests.clear()
    fetch(hub, tmp_path)
    assert not [path for method, path in hub.requests if method == "GET" and not path.startswith("/api/")]


@pytest.mark.parametrize("failure", ["gone", "repository gone", "server error"])
def test_mirror_is_used_when_the_first_origin_fails(hub, release, tmp_path, no_waiting, caplog, failure):
    file = release["dvae.pth"]
    first, mirror = file.origins[:2]
    if failure == "gone":
        hub.repository(first.repo_id).commit({}, revision=first.revision)
    elif failure == "repository gone":
        del hub.repositories[first.repo_id]
    else:
        hub.broken[first.repo_id] = 503
    hub.put(mirror.repo_id, mirror.path, CONTENT["dvae.pth"])
    fetched = fetch(hub, tmp_path, ["dvae.pth"])["dvae.pth"]
    assert fetched.path.read_bytes() == CONTENT["dvae.pth"]
    assert mirror.repo_id in fetched.origin
    assert f"dvae.pth comes from {mirror.repo_id}" in caplog.text
    assert first.url(hub.url) in caplog.text


def test_wrong_content_is_refused_even_with_the_right_size(hub, release, tmp_path):
    origin = release["tokenizer.json"].origins[0]
    wrong = bytes([CONTENT["tokenizer.json"][0] ^ 1]) + CONTENT["tokenizer.json"][1:]
    hub.put(origin.repo_id, origin.path, wrong)
    with pytest.raises(UserError) as error:
        fetch(hub, tmp_path, ["tokenizer.json"])
    assert hashlib.sha256(wrong).hexdigest() in str(error.value)
    assert release["tokenizer.json"].sha256 in str(error.value)
    assert "refused" in str(error.value)


def test_weights_without_a_pinned_hash_are_compared_with_what_the_hub_recorded(hub, release, tmp_path):
    hub.recorded_sha256[".models/autoregressive.pth"] = "ab" * 32
    with pytest.raises(UserError, match=f"expected {'ab' * 32}"):
        fetch(hub, tmp_path, ["autoregressive.pth"])


def test_cached_file_that_rotted_is_refused(hub, tmp_path):
    path = fetch(hub, tmp_path, ["autoregressive.pth"])["autoregressive.pth"].path
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-1] + b"!")
    with pytest.raises(UserError, match=r"delete .*blobs"):
        fetch(hub, tmp_path, ["autoregressive.pth"])


def test_server_down_cache_is_used(release, tmp_path, no_waiting):
    with HubServer() as hub:
        origin = release["mel_norms.pth"].origins[0]
        hub.put(origin.repo_id, origin.path, CONTENT["mel_norms.pth"])
        fetch(hub, tmp_path, ["mel_norms.pth"])
    assert fetch(hub, tmp_path, ["mel_norms.pth"])["mel_norms.pth"].path.read_bytes() == CONTENT["mel_norms.pth"]


def test_no_network_names_every_file_its_address_and_the_way_by_hand(release, tmp_path, no_waiting, caplog):
    with HubServer() as hub:
        pass  # nobody listens on its port any more
    with pytest.raises(UserError) as error:
        fetch(hub, tmp_path)
    message = str(error.value)
    for file in release.values():
        assert f"{file.name}" in message
        assert all(origin.url(hub.url) in message for origin in file.origins)
        assert file.sha256 is None or file.sha256 in message
    assert "--model.weights_dir" in message
    assert "could not be reached" in message
    (said,) = caplog.messages
    assert said.startswith("The Hub doesn't answer (")


@pytest.mark.parametrize("by_repository_path", [False, True])
def test_local_folder_needs_no_network(release, tmp_path, by_repository_path):
    for name, file in release.items():
        path = tmp_path / (file.origins[0].path if by_repository_path else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT[name])
    fetched = fetch_released(RELEASED, tmp_path, cache_dir=tmp_path / "cache", endpoint="http://127.0.0.1:1")
    assert {name: file.path.read_bytes() for name, file in fetched.items()} == CONTENT
    assert fetched["autoregressive.pth"].compared_with == "nothing"


def test_local_folder_may_be_another_programs_download_cache(hub, release, tmp_path):
    path = fetch(hub, tmp_path, ["autoregressive.pth"])["autoregressive.pth"].path
    found = fetch_released(["autoregressive.pth"], tmp_path / "cache", endpoint="http://127.0.0.1:1")
    assert found["autoregressive.pth"].path == path


def test_local_file_with_a_wrong_hash_is_refused(release, tmp_path):
    (tmp_path / "dvae.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"not the released dvae\.pth"):
        fetch_released(["dvae.pth"], tmp_path)


def test_weights_dir_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        fetch_released(["dvae.pth"], tmp_path / "nothing")


OFFLINE = """
import sys
from pathlib import Path
from tortoise_hf.errors import UserError
from tortoise_hf.models import released
released.RELEASED = {"autoregressive.pth": released.RELEASED["autoregressive.pth"]}
try:
    print(released.fetch_released(["autoregressive.pth"])["autoregressive.pth"].path.read_bytes().decode())
except UserError as error:
    print("UserError", error)
"""


def run_offline(cache, endpoint):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_offline_with_full_and_empty_cache_asks_nobody(hub, tmp_path):
    fetch(hub, tmp_path, ["autoregressive.pth"])
    hub.requests.clear()
    assert run_offline(tmp_path / "cache", hub.url).strip() == "content of autoregressive.pth"
    refused = run_offline(tmp_path / "empty", hub.url)
    assert refused.startswith("UserError")
    assert "HF_HUB_OFFLINE" in refused
    assert not hub.requests


def test_a_file_out_of_xet_storage_is_compared_with_its_sha256(hub, tmp_path, monkeypatch):
    """Newer clients keep such content under xet's hash, which is another one."""
    origin = RELEASED["autoregressive.pth"].origins[0]
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    addition = CommitOperationAdd(origin.path, CONTENT["autoregressive.pth"] * 10_000)
    HfApi(endpoint=hub.url, token="any").create_commit(origin.repo_id, [addition], commit_message="in xet storage")
    fetched = fetch(hub, tmp_path, ["autoregressive.pth"])["autoregressive.pth"]
    assert any("/xet/data/" in path for _, path in hub.requests)
    assert fetched.compared_with == "hub"
    assert fetched.sha256 == hashlib.sha256(addition.path_or_fileobj).hexdigest()
