"""The test Hub against the genuine client: what every other test of the Hub relies on."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

RANDOM = random.Random(0).randbytes(300_000)
CONTENT = {
    "model.safetensors": RANDOM + b"tortoise " * 20_000 + bytes(range(256)) * 300,
    "halves.bin": b"".join(bytes((byte, 0x3F)) for byte in RANDOM),
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
}


@pytest.mark.parametrize("storage", ["lfs", "multipart", "xet"])
def test_files_go_up_and_come_back_equal(hub, monkeypatch, tmp_path, storage):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", storage != "xet")
    hub.part_bytes = 100_000 if storage == "multipart" else 8_000_000
    api = HfApi()
    assert str(api.create_repo("me/voice", private=True)) == f"{hub.url}/me/voice"
    for number in range(2):  # the second time nothing changed, so there is no second commit
        additions = [CommitOperationAdd(path, data) for path, data in CONTENT.items()]
        api.create_commit("me/voice", additions, commit_message=f"push {number}")
    assert hub.repository("me/voice").titles() == ["initial commit", "push 0"]
    for path, data in CONTENT.items():
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", storage != "xet")
        assert Path(hf_hub_download("me/voice", path)).read_bytes() == data
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # and through plain HTTP, whatever it came by
        other = hf_hub_download("me/voice", path, cache_dir=tmp_path / "plain")
        assert Path(other).read_bytes() == data
    asked = [path for _, path in hub.requests]
    assert any("/xet/v1/xorbs" in path for path in asked) == (storage == "xet")
    assert any("/lfs/" in path and path.endswith("/2") for path in asked) == (storage == "multipart")
    api.create_commit("me/voice", [CommitOperationDelete("halves.bin")], commit_message="less")
    entries = {entry.path: entry for entry in api.list_repo_tree("me/voice", recursive=True)}
    assert set(entries) == {".gitattributes", "model.safetensors", "config.json", "empty.txt"}
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()


def test_accounts_and_errors(hub):
    api = HfApi()
    assert api.whoami()["name"] == "me"
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("somebody/voice")
    assert error.value.response.status_code == 403
    hub.put("somebody/secret", "a.txt", b"")
    hub.repository("somebody/secret").private = True
    for repo in ("somebody/secret", "me/nothing"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo)
    hub.put("me/voice", "a.txt", b"")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/voice", revision="other")
    head = hub.repository("me/voice").branches["main"]
    hub.put("me/voice", "b.txt", b"")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/voice", [CommitOperationAdd("c", b"c")], commit_message="late", parent_commit=head)


def test_long_trees_come_in_pages(hub):
    hub.page_size = 3
    for number in range(8):
        hub.put("me/voice", f"folder/{number}.txt", b"%d" % number)
    entries = list(HfApi().list_repo_tree("me/voice", recursive=True))
    assert [entry.path for entry in entries] == ["folder", *(f"folder/{number}.txt" for number in range(8))]
