"""Pushing a voice, and what can go wrong on the way: the genuine client against the test Hub."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import TOKEN
from hub.voice_maker import CONSENT, make_run
from hub_server import Account
from huggingface_hub import ModelCard, constants

from tortoise_hf.config import HubConfig
from tortoise_hf.errors import UserError
from tortoise_hf.hub import voice_folder
from tortoise_hf.hub.client import _wait_seconds, check_access
from tortoise_hf.hub.publish import NOTE, push_at_end, push_run

VOICE = {"hub__repo_id": "me/voice", "hub__consent": CONSENT}


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's own pauses between its attempts are left out; the attempts stay."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("finished"), tiny_base, **VOICE)


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def lfs(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class Waits(list):
    """Notes how long a retry would wait, and goes on at once."""

    def __call__(self, seconds):
        self.append(seconds)


def equals_export(hub, run, repo="me/voice", revision="main"):
    files = hub.repository(repo).files(revision)
    export = run / "export"
    names = ("model.safetensors", "5_gpt.pth", "config.json", "tokenizer.json")
    return all(files.get(name) == (export / name).read_bytes() for name in names)


@pytest.mark.parametrize("storage", ["lfs", "xet"])
def test_a_voice_is_one_commit_with_its_card(hub, run, monkeypatch, storage, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", storage == "lfs")
    said = []
    pushed = push_run(run, say=said.append)
    repository = hub.repository("me/voice")
    assert repository.private
    assert repository.titles() == ["initial commit", "Voice of step 5"]
    assert pushed.commit == repository.branches["main"]
    assert equals_export(hub, run)
    files = repository.files()
    assert ["there are no reference clips" in line for line in said] == [True]  # the recordings are gone
    assert files["training_curve.png"].startswith(b"\x89PNG")
    marker = json.loads(files["export.json"])
    assert all(
        hashlib.sha256(files[name]).hexdigest() == record["sha256"] and len(files[name]) == record["bytes"]
        for name, record in marker["files"].items()
    )
    assert not any(str(tmp_path).encode() in data for data in files.values())
    assert json.loads((run / NOTE).read_text())["commit"] == pushed.commit
    # The same again: nothing to push.
    assert push_run(run).changed is False
    assert len(repository.titles()) == 2


def test_the_card_says_what_a_voice_needs(hub, run, monkeypatch):
    push_run(run, {"license": "cc-by-4.0"})
    card = ModelCard(hub.repository("me/voice").files()["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "tortoise_hf"
    assert data["pipeline_tag"] == "text-to-speech"
    assert (data["license"], data["language"]) == ("cc-by-4.0", "en")
    assert "tortoise-tts" in data["tags"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"eval_loss": 2.25, "eval_mel_loss": 2.125, "eval_text_loss": 4.5}
    for words in (CONSENT, "12.3 minutes", "me/voice", "only a preview can be heard", "| 5 (this voice) | 2.2500 |"):
        assert words in card.text, words
    assert "conditioning/" not in card.text  # there are none
    assert "--ar-checkpoint" not in card.text  # it has sizes of its own
    monkeypatch.setattr(voice_folder, "fits_tortoise", lambda config: True)
    push_run(run)
    text = hub.repository("me/voice").files()["README.md"].decode()
    assert "--ar-checkpoint my_copy/5_gpt.pth" in text
    assert "preview" not in text
    assert "<audio" not in card.text


def test_samples_are_played_by_the_card(hub, run):
    folder = run / "samples"
    folder.mkdir()
    (folder / "one-tuned.wav").write_bytes(b"RIFF tuned")
    (folder / "one-base.wav").write_bytes(b"RIFF base")
    samples = [{"text": "Good morning.", "tuned": "one-tuned.wav", "base": "one-base.wav"}]
    (folder / "samples.json").write_text(json.dumps(samples))
    push_run(run)
    files = hub.repository("me/voice").files()
    assert files["samples/one-tuned.wav"] == b"RIFF tuned"
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["widget"] == [{"text": "Good morning.", "output": {"url": "samples/one-tuned.wav"}}]
    assert 'src="samples/one-base.wav"' in card.text


def test_consent_is_asked_for(hub, tmp_path, tiny_base):
    run = make_run(tmp_path, tiny_base, hub__repo_id="me/voice")
    with pytest.raises(UserError, match="consent is not set"):
        push_run(run)
    with pytest.raises(UserError, match="consent is not set"):
        check_access(HubConfig(repo_id="me/voice"))
    assert hub.repositories == {}


def test_another_branch(hub, run):
    push_run(run, {"revision": "trial"})
    assert equals_export(hub, run, revision="trial")
    assert set(hub.repository("me/voice").files("main")) == {".gitattributes"}


def test_a_newer_push_takes_old_files_away_and_leaves_others(hub, run):
    push_run(run)
    hub.put("me/voice", "4_gpt.pth", b"older weights")
    hub.put("me/voice", "picture.jpg", b"put there by hand")
    push_run(run)
    files = hub.repository("me/voice").files()
    assert "4_gpt.pth" not in files
    assert files["picture.jpg"] == b"put there by hand"


@pytest.mark.parametrize(
    "method, path",
    [("POST", "/preupload/"), ("POST", "/commit/"), ("POST", "objects/batch"), ("PUT", "/lfs/"), ("GET", "/tree/")],
)
def test_server_errors_pass(hub, run, lfs, no_waiting, method, path):
    hub.fail(method, path, 500, times=2)
    push_run(run, wait=Waits())
    assert equals_export(hub, run)
    assert len(hub.repository("me/voice").titles()) == 2


def test_a_rate_limit_is_waited_for(hub, run, lfs, monkeypatch):
    """By the client or by us, depending on its version and the request."""
    hub.fail("POST", "/commit/", 429, RateLimit='"api";r=0;t=37')
    waits = Waits()
    monkeypatch.setattr(time, "sleep", waits)
    push_run(run, wait=waits)
    assert [seconds for seconds in waits if 37 <= seconds <= 40]
    assert equals_export(hub, run)
    error = SimpleNamespace(response=SimpleNamespace(headers={"RateLimit": '"api";r=0;t=37'}))
    assert _wait_seconds(error, attempt=1) == 38


def test_connection_lost_in_the_middle_of_the_upload(hub, run, lfs, no_waiting):
    hub.fail("PUT", "/lfs/", "drop", times=3)
    push_run(run, wait=Waits())
    assert equals_export(hub, run)
    assert len(hub.repository("me/voice").titles()) == 2


@pytest.mark.parametrize("storage", ["lfs", "xet"])
def test_lost_answer_to_the_commit_makes_no_second_one(hub, run, monkeypatch, storage):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", storage == "lfs")
    hub.fail("POST", "/commit/", "lose")
    waits = Waits()
    pushed = push_run(run, wait=waits)
    assert len(waits) == 1
    assert hub.repository("me/voice").titles() == ["initial commit", "Voice of step 5"]
    assert pushed.commit == hub.repository("me/voice").branches["main"]


def test_a_hub_that_stays_down_leaves_a_note(hub, run, lfs, no_waiting):
    hub.broken["me/voice"] = 503
    waits = Waits()
    with pytest.raises(UserError, match="503"):
        push_run(run, attempts=4, wait=waits)
    assert [round(seconds / 2**number, 1) == pytest.approx(1, abs=0.21) for number, seconds in enumerate(waits, 1)]
    assert len(waits) == 3
    assert "503" in json.loads((run / NOTE).read_text())["pending"]
    hub.broken.clear()
    push_run(run)
    assert json.loads((run / NOTE).read_text())["pending"] is None
    assert equals_export(hub, run)


def _push_in_process(run):
    push_run(run)


def test_killed_in_the_middle_the_repository_is_not_half_updated(hub, run, lfs):
    push_run(run)
    before = hub.repository("me/voice").branches["main"]
    run2 = run.with_name("second")
    shutil.copytree(run, run2)
    (run2 / "export" / "tokenizer.json").write_text((run2 / "export" / "tokenizer.json").read_text() + "\n")
    reached, go_on = threading.Event(), threading.Event()

    def hold(request):
        reached.set()
        go_on.wait(20)

    hub.fail("POST", "/commit/", hold)
    process = multiprocessing.get_context("fork").Process(target=_push_in_process, args=(run2,))
    process.start()
    assert reached.wait(30)
    process.kill()
    process.join()
    assert hub.repository("me/voice").branches["main"] == before
    hub.faults.clear()
    assert push_run(run2).changed
    assert hub.repository("me/voice").files()["tokenizer.json"].endswith(b"\n\n") or equals_export(hub, run2)
    go_on.set()
    time.sleep(0.2)
    assert equals_export(hub, run2)


def test_two_pushes_at_once_end_with_one_of_them_whole(hub, tmp_path, tiny_base, lfs):
    runs = [make_run(tmp_path, tiny_base, value=float(n), name=f"run{n}", **VOICE) for n in (1, 2)]
    push_run(runs[0])
    for run in runs:
        (run / "export" / "training_summary.json").write_text(
            (run / "export" / "training_summary.json").read_text() + "\n"
        )
    gate = threading.Barrier(2)
    seen = []

    def meet(request):
        seen.append(request.path)
        gate.wait(10)

    hub.fail("POST", "/commit/", meet, times=2)
    # The first run differs from what is there in a line, so that both have something to commit.
    summary = runs[0] / "export" / "training_summary.json"
    summary.write_text(summary.read_text().replace('"num_train_clips": 7', '"num_train_clips": 8'))
    problems = []

    def push(run):
        try:
            push_run(run, wait=Waits())
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=push, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (problems, len(seen)) == ([], 2)
    assert [path for _, path in hub.requests].count("/api/models/me/voice/commit/main") >= 4
    assert sum(equals_export(hub, run) for run in runs) == 1


def test_tokens_that_cannot_write_are_refused_before_the_first_step(hub, monkeypatch):
    wanted = HubConfig(repo_id="me/voice", consent=CONSENT)
    assert check_access(wanted) is None
    hub.accounts[TOKEN] = Account("me", role="read")
    with pytest.raises(UserError, match="can't write"):
        check_access(wanted)
    hub.accounts[TOKEN] = Account("me")
    with pytest.raises(UserError, match="belongs to somebody, and the token to me"):
        check_access(HubConfig(repo_id="somebody/voice", consent=CONSENT))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="doesn't accept the token"):
        check_access(wanted)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no token"):
        check_access(wanted)


def test_a_taken_repository_is_left_alone(hub, run):
    hub.put("me/voice", "thesis.tex", b"years of work")
    with pytest.raises(UserError, match="me/voice is taken: it holds 1 files"):
        check_access(HubConfig(repo_id="me/voice", consent=CONSENT))
    with pytest.raises(UserError, match="is taken"):
        push_run(run)
    assert set(hub.repository("me/voice").files()) == {"thesis.tex"}


def test_a_hub_that_is_down_at_the_start_is_a_warning(hub, no_waiting):
    hub.fail("GET", "whoami", 503, times=50)
    assert "The run begins all the same" in check_access(HubConfig(repo_id="me/voice", consent=CONSENT))


@pytest.mark.parametrize(
    "name, text, finding",
    [
        ("notes.txt", f"login {TOKEN}", "your access token"),
        ("dvae/notes.json", '{"a": "hf_' + "Zy9" * 12 + '"}', "access token"),
        ("notes.txt", "see /home/somebody/recordings", "/home/somebody"),
        ("notes.md", r"C:\Users\somebody", "C:"),
        ("weights.pth", "\0\0" + TOKEN, "your access token"),
    ],
)
def test_tokens_and_local_paths_stay_here(hub, run, name, text, finding):
    (run / "export" / "dvae").mkdir(exist_ok=True)
    (run / "export" / name).write_text(text)
    with pytest.raises(UserError, match=finding) as error:
        push_run(run)
    assert TOKEN not in str(error.value)
    assert "me/voice" not in hub.repositories


def test_the_end_of_a_run_survives_any_failure(hub, run, no_waiting):
    hub.accounts.clear()
    hub.accounts["other"] = Account("other")
    assert "push it later with: python scripts/push.py" in push_at_end(run)


def test_validated_yaml_of_the_card(hub, run):
    push_run(run)
    assert ("POST", "/api/validate-yaml") in hub.requests
    head = hub.repository("me/voice").files()["README.md"].decode().split("---")[1]
    assert yaml.safe_load(head)["model-index"][0]["results"]
