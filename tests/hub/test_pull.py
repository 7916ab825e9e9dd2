"""Pulling a voice: what is compared, what is refused, and what happens without a Hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_config
from hub.voice_maker import make_run
from hub_xet import CHUNK_HEADER
from huggingface_hub import CommitOperationAdd, HfApi, constants
from safetensors.torch import load_file, save

from tortoise_hf.errors import UserError
from tortoise_hf.hub import pull_voice
from tortoise_hf.hub.local_copy import copy_voice
from tortoise_hf.hub.pull import is_safe_name
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import load_gpt, resolve_base

NAMES = ("config.json", "model.safetensors", "tokenizer.json", "mel_norms.safetensors", "export.json")


@pytest.fixture(scope="module")
def export(tmp_path_factory, tiny_base):
    """Files of a voice by name."""
    folder = make_run(tmp_path_factory.mktemp("voice"), tiny_base) / "export"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    summary = json.loads(files["training_summary.json"]) | {"lineage": ["jbetker/tortoise-tts-v2"]}
    files["training_summary.json"] = json.dumps(summary).encode()
    return files


@pytest.fixture
def voice(hub, export, monkeypatch):
    """The voice on the Hub, with a reference clip and things that nobody needs."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between its attempts
    hub.repository("me/voice").commit({**export, "conditioning/1.wav": b"RIFF", "big.bin": b"x" * 1000, "a/b.py": b"1"})
    return hub


def change(hub, **files):
    before = hub.repository("me/voice").files()
    named = {name.replace("__", "/").replace("_dot_", "."): data for name, data in files.items()}
    hub.repository("me/voice").commit({name: data for name, data in {**before, **named}.items() if data is not None})


def test_a_voice_comes_whole_and_without_what_nobody_needs(voice, export, tmp_path):
    folder = pull_voice("me/voice")
    (folder / "model.safetensors").resolve().chmod(0o444)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found >= {*NAMES, "conditioning/1.wav", "dvae/config.json", "dvae/model.safetensors"}
    assert not found & {"big.bin", "a/b.py", "5_gpt.pth"}
    assert all((folder / name).read_bytes() == export[name] for name in NAMES)
    weights = load_file(folder / "model.safetensors")
    assert all(tensor.equal(weights[key]) for key, tensor in TortoiseGPT.from_pretrained(folder).state_dict().items())
    copy_voice(folder, tmp_path / "mine")
    assert not (tmp_path / "mine" / "model.safetensors").is_symlink()
    assert all(path.stat().st_mode & stat.S_IWUSR for path in (tmp_path / "mine").rglob("*"))  # the cache's may not be
    with pytest.raises(UserError, match="not empty"):
        copy_voice(folder, tmp_path / "mine")
    assert pull_voice(tmp_path / "mine") == tmp_path / "mine"


def test_a_revision_is_taken_as_asked(voice):
    first = voice.repository("me/voice").branches["main"]
    change(voice, config_dot_json=voice.repository("me/voice").files()["config.json"] + b"\n")
    assert pull_voice("me/voice", first).name == first
    assert pull_voice(f"me/voice@{first}").name == first
    assert pull_voice("me/voice").name != first
    assert pull_voice(f"me/voice@{first}", first).name == first
    with pytest.raises(UserError, match=f"me/voice@{first} names the revision {first}, and main was asked for as well"):
        pull_voice(f"me/voice@{first}", "main")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_byte_of_equal_size_is_noticed(voice, export, name):
    data = bytearray(export[name])
    data[-3] ^= 1
    voice.served[name] = bytes(data)
    with pytest.raises(UserError, match=f"me/voice/{name} arrived damaged.*pull again"):
        pull_voice("me/voice")
    voice.served.clear()
    assert (pull_voice("me/voice") / name).read_bytes() == export[name]  # the damaged one is not in the cache


def test_a_truncated_file_is_noticed(voice, export):
    voice.served["model.safetensors"] = export["model.safetensors"][:-100]
    with pytest.raises(UserError):
        pull_voice("me/voice")
    voice.served.clear()
    assert (pull_voice("me/voice") / "model.safetensors").read_bytes() == export["model.safetensors"]


def test_a_cached_file_that_rotted_is_noticed_offline(voice, export):
    folder = pull_voice("me/voice")
    path = folder / "model.safetensors"
    path.resolve().write_bytes(export["model.safetensors"][:-1] + b"!")
    with pytest.raises(UserError, match="arrived damaged"):
        pull_voice("me/voice", offline=True)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b.json", "..\\windows.json", "C:evil.json", "a//b", "a\nb"]
)
def test_names_that_lead_out_of_the_folder_are_refused(voice, name, tmp_path):
    assert not is_safe_name(name)
    voice.repository("me/voice").commit({**voice.repository("me/voice").files(), name: b"{}"})
    with pytest.raises(UserError, match="written outside its folder"):
        pull_voice("me/voice")
    assert not any(method == "GET" and "/resolve/" in path for method, path in voice.requests)


def evil_pickle():
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    stream = io.BytesIO()
    torch.save({"text_embedding.weight": torch.zeros(2), "x": Evil()}, stream)
    return stream.getvalue()


def test_pickles_with_code_are_not_opened(voice, capsys):
    change(voice, **{"model_dot_safetensors": None, "5_gpt_dot_pth": evil_pickle()})
    with pytest.raises(UserError, match="could run code when opened, so it was not opened"):
        pull_voice("me/voice")
    assert "code ran" not in capsys.readouterr().out


def test_weights_in_the_published_layout_alone_are_enough(voice, tmp_path):
    change(voice, model_dot_safetensors=None)
    files = resolve_base(make_config(tmp_path, model__base="me/voice").model)
    assert files.gpt_weights.name == "5_gpt.pth"
    assert load_gpt(files).final_norm.bias.unique().tolist() == [5.0]


def config_with(export, **changes):
    return json.dumps(json.loads(export["config.json"]) | changes).encode()


def safetensors(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "name, make, sentence",
    [
        ("config.json", lambda e: config_with(e, num_layers=10**9), "num_layers 1000000000"),
        ("config.json", lambda e: config_with(e, hidden_size=-1), "hidden_size -1"),
        ("config.json", lambda e: config_with(e, num_heads="many"), "num_heads 'many'"),
        ("config.json", lambda e: config_with(e, hidden_size=128), "don't belong together"),
        ("config.json", lambda e: config_with(e, model_type="llama"), "not a voice of this program.*llama"),
        ("config.json", lambda e: b"[" * 100_000, "can't be read as JSON"),
        ("config.json", lambda e: b"[1]", "holds list"),
        ("config.json", lambda e: b"{}" + b" " * 20_000_001, "20,000,003 bytes; at most 20,000,000"),
        ("tokenizer.json", lambda e: b"not json", "tokenizer.json can't be read"),
        ("latents.safetensors", lambda e: save({"gpt": torch.zeros(1, 9)}), r"holds \(1, 9\) for the GPT, expected"),
        ("latents.safetensors", lambda e: struct.pack("<Q", 9) + b"{}", "latents.safetensors is not a sound"),
        ("mel_norms.safetensors", lambda e: b"PK", "mel_norms.safetensors is not a sound safetensors file"),
        ("model.safetensors", lambda e: struct.pack("<Q", 2**60) + b"{}", "not a sound safetensors file"),
        ("model.safetensors", lambda e: b"", "not a sound safetensors file"),
        (
            "model.safetensors",
            lambda e: safetensors({"final_norm.bias": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}),
            "not a sound safetensors file",
        ),
    ],
)
def test_hostile_contents_are_refused_in_a_sentence(voice, export, name, make, sentence):
    change(voice, **{name.replace(".", "_dot_"): make(export)})
    with pytest.raises(UserError, match=sentence) as error:
        pull_voice("me/voice")
    assert "\n" not in str(error.value)


def test_what_is_no_voice(voice):
    voice.put("me/other", "README.md", b"hello")
    with pytest.raises(UserError, match=r"me/other is not a voice of this program: it has no config\.json"):
        pull_voice("me/other")


@pytest.mark.parametrize(
    "wanted, revision, sentence",
    [
        ("me/nothing", None, "not on the Hub.*Check the spelling"),
        ("me/voice", "v9", "no revision 'v9'"),
        ("somebody/secret", None, "not on the Hub, or not for this account"),
        ("somebody/gated", None, "gated: ask for access"),
        ("not a name", None, "neither a folder on this machine nor the name of a voice"),
        ("a/b/c", None, "neither a folder on this machine nor the name of a voice"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(voice, wanted, revision, sentence):
    for name in ("secret", "gated"):
        voice.put(f"somebody/{name}", "config.json", b"{}")
    voice.repository("somebody/secret").private = True
    voice.repository("somebody/gated").gated = True
    with pytest.raises(UserError, match=sentence):
        pull_voice(wanted, revision)


def test_private_without_login(voice, monkeypatch):
    voice.repository("me/voice").private = True
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UserError, match="If it is private: log in with `hf auth login`"):
        pull_voice("me/voice")


@pytest.mark.parametrize("down", ["503", "gone", "offline"])
def test_without_a_hub_the_cache_serves_or_a_sentence_comes(voice, export, down, tmp_path, monkeypatch):
    folder = pull_voice("me/voice")
    if down == "503":
        voice.broken["me/voice"] = 503
    elif down == "gone":
        voice.fail("GET", "", "drop", times=1000)
    offline = down == "offline"
    assert pull_voice("me/voice", offline=offline) == folder
    with pytest.raises(UserError, match="not in the cache either"):
        pull_voice("me/voice", cache_dir=tmp_path / "empty", offline=offline)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="only a part"):
        pull_voice("me/voice", offline=offline)


def test_too_little_room_is_said_before_anything_is_fetched(voice, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 0.00 GB and the disk of .* has 0.00 GB left"):
        pull_voice("me/voice")
    assert not any("/resolve/" in path for _, path in voice.requests)


def push(hub, files):
    """Files in the storage that the genuine client chooses, xet unless it is switched off."""
    api = HfApi()
    api.create_repo("me/stored")
    api.create_commit(
        "me/stored", [CommitOperationAdd(name, data) for name, data in files.items()], commit_message="voice"
    )


@pytest.mark.parametrize("storage", ["lfs", "xet"])
def test_a_disk_that_fills_up_while_pulling(hub, export, small_disk, monkeypatch, tmp_path, storage):
    """Something else takes the room between the look at the disk and the end of the download."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", storage == "lfs")
    push(hub, {**export, "model.safetensors": random.Random(0).randbytes(4_000_000)})
    disk = small_disk("12m")
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(disk / "xet"))

    def fill(request):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "something_else").write_bytes(b"x" * (free - 1_000_000))

    hub.fail("GET", "/blob/.*/model.safetensors" if storage == "lfs" else "/xet/data/", fill)
    with pytest.raises(UserError, match=r"The disk is full: me/stored did not fit into .*disk/cache\. Free some space"):
        pull_voice("me/stored", cache_dir=disk / "cache")
    assert hub.faults[0].times == 0
    # What is there is not taken for a voice, and leaves room where the weights would have been.
    with pytest.raises(UserError, match="not in the cache"):
        pull_voice("me/stored", cache_dir=disk / "cache", offline=True)
    assert sum(path.stat().st_size for path in (disk / "cache").rglob("*") if path.is_file()) < 3_000_000


def test_a_copy_that_does_not_fit_leaves_nothing(voice, small_disk):
    disk = small_disk("500k")
    with pytest.raises(UserError, match=r"mine can't be written .*No space left"):
        copy_voice(pull_voice("me/voice"), disk / "mine")
    assert list(disk.iterdir()) == []


def test_files_that_may_not_grow_are_a_full_disk(voice, monkeypatch):
    """A quota, without root: the system refuses to let any file grow further."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"The disk is full.*HF_HOME"):
            pull_voice("me/voice")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (pull_voice("me/voice") / "model.safetensors").is_file()


def flip(hub, content):
    """Change a byte of a file's first chunk; gives the chunk's compression and a function that changes it back."""
    xorbs = hub.xet.xorbs
    name, _, chunk, _ = hub.xet.terms[hub.xet.files_by_sha256[hashlib.sha256(content).hexdigest()]][0]
    before, (start, _) = xorbs[name], hub.xet.spans(name)[chunk]
    place = start + CHUNK_HEADER + 50
    xorbs[name] = before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :]
    return before[start + 4], lambda: xorbs.update({name: before})


def test_a_voice_out_of_xet_storage_serves_offline_and_is_compared(hub, export):
    """Newer clients keep such content for all repositories together, under xet's hash."""
    push(hub, export)
    folder = pull_voice("me/stored")
    assert any("/xet/data/" in path for _, path in hub.requests)
    assert pull_voice("me/stored", offline=True) == folder
    assert all((folder / name).read_bytes() == export[name] for name in NAMES)
    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="arrived damaged"):
        pull_voice("me/stored", offline=True)
    assert not weights.exists()
    assert (pull_voice("me/stored") / "model.safetensors").read_bytes() == export["model.safetensors"]


def test_a_byte_flipped_in_xet_storage_is_noticed(hub, export):
    """The client takes it: a chunk's hash isn't compared. Random bytes, so that chunks are stored as they are."""
    content = random.Random(0).randbytes(200_000)
    push(hub, {**export, "model.safetensors": content})
    compression, restore = flip(hub, content)
    assert compression == 0
    with pytest.raises(UserError, match=r"me/stored/model.safetensors arrived damaged: 200,000 bytes with hash"):
        pull_voice("me/stored")
    assert any("/xet/data/" in path for _, path in hub.requests)
    restore()
    with pytest.raises(UserError, match="not a sound safetensors file"):  # whole again: now it is looked into
        pull_voice("me/stored")


def test_a_byte_flipped_in_a_compressed_xet_chunk_is_noticed(hub, export, repository, tmp_path):
    """The client can't unpack it and asks again, six times in three and a half minutes, unless it is told otherwise."""
    content = b"tortoise " * 40_000
    push(hub, {**export, "model.safetensors": content})
    compression, _ = flip(hub, content)
    assert compression == 1
    done = subprocess.run(
        [sys.executable, str(repository / "scripts" / "pull.py"), "me/stored", str(tmp_path / "copy")],
        env=os.environ | {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1
    assert "Files of me/stored could not be transferred (RuntimeError" in done.stderr
    assert "not in the cache either" in done.stderr
    assert not (tmp_path / "copy").exists()


def test_a_voice_is_a_base_and_its_lineage_is_kept(voice, tmp_path):
    commit = voice.repository("me/voice").branches["main"]
    files = resolve_base(make_config(tmp_path, model__base="me/voice").model)
    assert files.lineage == (f"me/voice@{commit}", "jbetker/tortoise-tts-v2")
    assert load_gpt(files).final_norm.bias.unique().tolist() == [5.0]
