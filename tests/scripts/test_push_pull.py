"""From a folder of clips to a voice on the Hub and back, and a run that goes on elsewhere: the scripts themselves."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TOKEN
from faults.harness import log_of
from huggingface_hub import DatasetCard, ModelCard, constants
from safetensors.torch import load_file
from scripts.test_train import tiny_run

CONSENT = "My own voice."


@pytest.fixture(autouse=True)
def no_giving_way(monkeypatch):
    """On a busy machine pushes beside a run would take minutes."""
    monkeypatch.setattr("tortoise_hf.callbacks.hub.NICENESS", 0)


@pytest.fixture
def call(capsys):
    """Calls a script's main in this process; gives what it printed."""

    def run(script, *arguments, code=0):
        spec = importlib.util.spec_from_file_location(script, REPOSITORY / "scripts" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        AcceleratorState._reset_state(reset_partial_state=True)
        found = 0
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            found = stop.code
        AcceleratorState._reset_state(reset_partial_state=True)
        done = capsys.readouterr()
        assert found == code, done.out + done.err
        return done.out + done.err

    return run


def hub_flags(flags, **settings):
    return [*flags, *(word for key, value in settings.items() for word in (f"--hub.{key}", value))]


def test_from_clips_to_a_pulled_voice_and_its_child(hub, call, tiny_base, tiny_voice, tmp_path):
    data = tiny_voice(8)
    flags = hub_flags(tiny_run(tiny_base, data, tmp_path), repo_id="me/voice", consent=CONSENT)
    shown = call("train", *flags)
    assert "Pushed: " in shown
    files = hub.repository("me/voice").files()
    assert files["model.safetensors"] == (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert {"conditioning/clip-1.wav", "conditioning/clip-4.wav", "training_curve.png", "README.md"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert "random weights" in card.text
    assert "reference clips" in card.text
    assert not any(TOKEN.encode() in data or str(tmp_path).encode() in data for data in files.values())
    assert TOKEN not in (tmp_path / "run" / "run.json").read_text() + shown
    # Pushing again by hand: nothing is new.
    assert "Already up to date" in call("push", tmp_path / "run")
    shown = call("pull", "me/voice", tmp_path / "copy")
    assert "all as the Hub recorded them" in shown
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "me/voice" in call("voices", "search", "voi")
    assert "No voice" in call("voices", "search", "nobody")
    # The voice is the start of the next one, and the card of that one says so.
    settings = {"model__from_scratch": "false", "training__max_steps": 1}
    flags = tiny_run("me/voice", data, tmp_path, name="child", **settings)
    call("train", *hub_flags(flags, repo_id="me/child", consent=CONSENT))
    card = ModelCard(hub.repository("me/child").files()["README.md"].decode())
    commit = hub.repository("me/voice").branches["main"]
    assert card.data.to_dict()["base_model"] == "me/voice"
    assert f"me/voice@{commit}, which started from random weights" in card.text


def test_an_adapter_goes_alone_and_its_base_is_found_again(hub, call, tiny_base, tiny_voice, tmp_path):
    """While training and at the end; then pulled, heard, and trained on, as somebody else would."""
    data = tiny_voice(8)
    flags = tiny_run(tiny_base, data, tmp_path, name="base", training__max_steps=1)
    call("train", *hub_flags(flags, repo_id="me/base", consent=CONSENT))
    base = hub.repository("me/base").branches["main"]
    settings = {"model__from_scratch": "false", "lora__rank": 2, "training__save_steps": 2}
    to_hub = {"repo_id": "me/voice", "consent": CONSENT, "adapter_only": "true"}
    alone = call(
        "train", *hub_flags(tiny_run(tmp_path / "base" / "export", data, tmp_path, **settings), **to_hub), code=1
    )
    assert "is on this machine alone" in alone
    assert not (tmp_path / "run").exists()
    flags = tiny_run("me/base", data, tmp_path, **settings)
    call("train", *hub_flags(flags, **to_hub, push="checkpoint"))
    repository = hub.repository("me/voice")
    assert len(repository.titles()) >= 2
    for commit, _ in repository.history["main"][1:]:  # every state was a voice, and none of them whole
        files = repository.snapshots[commit]
        assert "model.safetensors" not in files
        assert not any(name.endswith(".pth") for name in files)
        assert {"adapter_model.safetensors", "latents.safetensors", "tokenizer.json"} < set(files)
        assert json.loads(files["adapter_config.json"])["revision"] == base
    best = json.loads(repository.files()["export.json"])["step"]
    checkpoint = tmp_path / "run" / f"checkpoint-{best}"
    assert repository.files()["adapter_model.safetensors"] == (checkpoint / "adapter_model.safetensors").read_bytes()
    shown = call("pull", "me/voice", tmp_path / "copy")
    assert f"It is an adapter to me/base@{base}, which is here as well" in shown
    whole = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == whole
    call("speak", "Hello.", "--voice", "me/voice", "--preview", "--max_codes", 5, "--out", tmp_path / "hello.wav")
    assert (tmp_path / "hello.wav").stat().st_size > 1000
    # The start of the next one, which is pushed whole.
    flags = tiny_run("me/voice", data, tmp_path, name="child", model__from_scratch="false", training__max_steps=1)
    call("train", *hub_flags(flags, repo_id="me/child", consent=CONSENT))
    card = ModelCard(hub.repository("me/child").files()["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "me/voice"
    assert f"which started from me/base@{base}, which started from random weights" in card.text


@pytest.mark.parametrize("push", ["best", "checkpoint", "every_eval"])
def test_pushes_while_training(hub, call, tiny_base, tiny_voice, tmp_path, push):
    settings = {"training__max_steps": 6, "training__save_steps": 3, "training__eval_steps": 2}
    flags = tiny_run(tiny_base, tiny_voice(8), tmp_path, **settings)
    shown = call("train", *hub_flags(flags, repo_id="me/voice", consent=CONSENT, push=push))
    titles = hub.repository("me/voice").titles()
    assert "Pushed: " in shown or "Already up to date" in shown
    assert len(titles) >= 2
    assert (
        hub.repository("me/voice").files()["model.safetensors"]
        == (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    )
    for commit, _ in hub.repository("me/voice").history["main"][1:]:  # every state was a whole voice
        files = hub.repository("me/voice").snapshots[commit]
        step = json.loads(files["export.json"])["step"]
        assert f"{step}_gpt.pth" in files
        assert sum(name.endswith("_gpt.pth") for name in files) == 1
    if push == "every_eval":
        assert (tmp_path / "run" / "checkpoint-6").is_dir()
    assert not (tmp_path / "run" / ".hub").exists()


def test_a_failed_push_never_hurts_the_run(hub, call, tiny_base, tiny_voice, tmp_path, monkeypatch):
    flags = tiny_run(tiny_base, tiny_voice(8), tmp_path)
    monkeypatch.setattr("tortoise_hf.hub.client.ATTEMPTS", 1)
    hub.fail("POST", "/api/repos/create", 500, times=1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shown = call("train", *hub_flags(flags, repo_id="me/voice", consent=CONSENT, push="every_eval"))
    assert "Not pushed: " in shown
    assert f"python scripts/push.py {tmp_path / 'run'}" in shown
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished_step"] == 3
    hub.faults.clear()
    assert "Pushed: " in call("push", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "push.json").read_text())["pending"] is None


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"repo_id": "me/voice"}, "hub.consent is not set"),
        ({"repo_id": "somebody/voice", "consent": CONSENT}, "belongs to somebody"),
        ({"repo_id": "voice", "consent": CONSENT}, "hub.repo_id must have the form owner/name"),
        ({"repo_id": "me/voice", "push": "sometimes"}, "hub.push"),
    ],
)
def test_what_cannot_be_pushed_ends_before_the_first_step(
    hub, call, tiny_base, tiny_voice, tmp_path, settings, sentence
):
    flags = hub_flags(tiny_run(tiny_base, tiny_voice(3), tmp_path), **settings)
    shown = call("train", *flags, code=2 if "form" in sentence or sentence == "hub.push" else 1)
    assert sentence in shown
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_hub_bit_for_bit(hub, call, tiny_base, tiny_voice, tmp_path):
    """Another machine: another folder, another cache, nothing but the data, the settings and the Hub."""
    data = tiny_voice(8)
    settings = {"training__save_steps": 2, "training__max_steps": 6, "optim__lr_schedule": "constant"}
    begun = settings | {"training__max_steps": 4}
    call("train", *tiny_run(tiny_base, data, tmp_path, name="whole", **settings))
    flags = tiny_run(tiny_base, data, tmp_path, name="first", **begun)
    call("train", *hub_flags(flags, checkpoint_repo_id="me/checkpoints"))
    repository = hub.repository("me/checkpoints")
    assert repository.private
    assert not any(str(tmp_path).encode() in content for content in repository.files().values())
    shutil.move(tmp_path / "first", tmp_path / "lost")
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere" / "voice")
    flags = tiny_run(tiny_base, elsewhere, tmp_path, name="second", **settings)
    flags[flags.index("--data.cache_dir") + 1] = str(tmp_path / "elsewhere" / "cache")
    shown = call("train", *flags, "--training.resume", "hub:me/checkpoints")
    assert "Fetched checkpoint-" in shown
    assert "Going on from" in shown
    one, two = (load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "second"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert log_of(tmp_path / "second") == log_of(tmp_path / "whole")
    # Once more: what is here is as new as what is there.
    shown = call("train", *flags, "--training.resume", "hub:me/checkpoints")
    assert "going on with what is here" in shown


@pytest.mark.parametrize("what", ["nothing", "a voice", "flipped byte"])
def test_what_is_no_checkpoint_is_refused(hub, call, tiny_base, tiny_voice, tmp_path, what, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    data = tiny_voice(6)
    if what == "a voice":
        hub.put("me/checkpoints", "model.safetensors", b"")
    elif what == "flipped byte":
        flags = tiny_run(tiny_base, data, tmp_path, name="first", training__max_steps=1)
        call("train", *hub_flags(flags, checkpoint_repo_id="me/checkpoints"))
        files = hub.repository("me/checkpoints").files()
        name = next(name for name in files if name.endswith("optimizer.pt"))
        hub.served[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    flags = tiny_run(tiny_base, data, tmp_path, name="second")
    shown = call("train", *flags, "--training.resume", "hub:me/checkpoints", code=1)
    sentence = {"nothing": "not on the Hub", "a voice": "no checkpoints", "flipped byte": "arrived damaged"}[what]
    assert sentence in shown
    assert not (tmp_path / "second" / "run.json").exists()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_recordings_are_shared_and_trained_on_from_the_hub(hub, call, tiny_base, tiny_voice, tmp_path, streaming):
    """Pushed as a dataset and read back, the clips, the split and so the losses are those of the folder."""
    data = tiny_voice(8)
    flags = tiny_run(tiny_base, data, tmp_path, name="from-folder", training__max_steps=2)
    assert "hub.consent is not set" in call("prepare", *flags, "--push", "me/recordings", code=1)
    shown = call("prepare", *hub_flags(flags, consent=CONSENT), "--push", "me/recordings")
    assert "Pushed: " in shown
    assert "Already up to date" in call("prepare", *hub_flags(flags, consent=CONSENT), "--push", "me/recordings")
    repository = hub.repository("datasets/me/recordings")
    assert repository.private
    assert repository.titles() == ["initial commit", "8 clips"]
    assert not any(str(tmp_path).encode() in content for content in repository.files().values())
    card = DatasetCard(repository.files()["README.md"].decode())
    assert card.data.to_dict()["task_categories"] == ["text-to-speech"]
    assert CONSENT in card.text
    call("train", *flags)
    settings = {"training__max_steps": 2, "data__eval_split": "validation", "data__streaming": streaming}
    flags = tiny_run(tiny_base, "me/recordings", tmp_path, name="from-hub", **settings)
    flags[flags.index("--data.cache_dir") + 1] = str(tmp_path / "elsewhere")
    call("train", *flags)
    clips = [json.loads((tmp_path / name / "train_clips.json").read_text()) for name in ("from-folder", "from-hub")]
    assert clips[0] == clips[1]
    assert log_of(tmp_path / "from-hub") == log_of(tmp_path / "from-folder")
