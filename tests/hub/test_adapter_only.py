"""An adapter on the Hub without the weights it belongs to: what is pushed, and what becomes of it elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import soundfile
import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from hub.voice_maker import CONSENT, LOG, make_run
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import TrainerState

from tortoise_hf.callbacks.hub import held_by_pushes
from tortoise_hf.checkpoint import save_checkpoint
from tortoise_hf.config import ModelConfig, OptimConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export_run import export_run
from tortoise_hf.hub.adapter_only import check_shareable_base
from tortoise_hf.hub.local_copy import copy_voice
from tortoise_hf.hub.publish import check_before_training, push_run
from tortoise_hf.hub.pull import pull_voice
from tortoise_hf.latents import gpt_latent
from tortoise_hf.lora import add_adapter, fingerprint
from tortoise_hf.models import pretrained
from tortoise_hf.models.pretrained import load_base_weights, load_gpt, resolve_base
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.voice import Voice

WHOLE = ("model.safetensors", "5_gpt.pth", "dvae/model.safetensors")


@pytest.fixture(scope="module")
def base_files(tmp_path_factory, tiny_base):
    """Files of a whole voice by name."""
    folder = make_run(tmp_path_factory.mktemp("whole"), tiny_base) / "export"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(hub, base_files):
    """Commit of the whole voice me/base on the Hub."""
    return hub.repository("me/base").commit(base_files)


def make_adapter_run(tmp_path, base="me/base", name="lora", repo_id="me/voice", **settings):
    """A run's folder with an adapter to a voice on the Hub as its checkpoint, exported; it has a reference clip."""
    folder = tmp_path / name
    values = {"model__base": base, "lora__rank": 2, "data__root": str(tmp_path / "recordings"), "hub__consent": CONSENT}
    values |= {"hub__repo_id": repo_id, "hub__adapter_only": True, "training__output_dir": str(folder)}
    cfg = make_config(tmp_path, **values | settings)
    model = load_gpt(resolve_base(cfg.model))
    add_adapter(model, cfg.lora, seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(0.1 * torch.randn(value.shape))
    optimizer = build_optimizer(model, OptimConfig())
    state = TrainerState(global_step=5, best_global_step=5, best_model_checkpoint="checkpoint-5", log_history=LOG)
    scheduler = build_lr_scheduler(optimizer, OptimConfig(), max_steps=10)
    save_checkpoint(folder, Accelerator(cpu=True), model, optimizer, scheduler, state)
    (folder / "run.json").write_text(json.dumps({"config": cfg.to_dict(), "num_train_clips": 7, "cwd": os.getcwd()}))
    (folder / "conditioning").mkdir()
    soundfile.write(folder / "conditioning" / "clip-1.wav", 0.1 * torch.randn(22_050).numpy(), 22_050)
    export_run(folder, folder / "export")
    return folder


@pytest.fixture(scope="module")
def made_once():
    """What the first test made of the run's folder and its repository; the others begin with copies."""
    return {}


@pytest.fixture
def voice(hub, base, tmp_path, tmp_path_factory, monkeypatch, made_once):
    """The run's folder, its adapter pushed as me/voice."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between its attempts
    if not made_once:
        run = make_adapter_run(tmp_path_factory.mktemp("run"))
        push_run(run)
        made_once.update(run=run, files=hub.repository("me/voice").files())
    else:
        hub.repository("me/voice").commit(made_once["files"])
    return Path(shutil.copytree(made_once["run"], tmp_path / "lora"))


def size(files):
    return sum(map(len, files.values()))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- what is pushed ---------------------------------------------------------------------------------------------------


def test_the_repository_holds_the_adapter_and_what_makes_it_a_voice(hub, voice, base, base_files, tmp_path):
    files = hub.repository("me/voice").files()
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} < set(files)
    assert {"mel_norms.safetensors", "conditioning/clip-1.wav", "latents.safetensors", "README.md"} < set(files)
    assert not any(name.endswith(".pth") or "model.safetensors" in name.split("/") for name in files)
    others = size({name: data for name, data in files.items() if name.startswith(("conditioning/", "training_curve"))})
    assert size(files) - others < 0.05 * size(base_files)
    assert files["adapter_model.safetensors"] == (voice / "checkpoint-5" / "adapter_model.safetensors").read_bytes()
    marker = json.loads(files["export.json"])
    assert all(hashlib.sha256(files[name]).hexdigest() == made["sha256"] for name, made in marker["files"].items())
    assert "adapter_config.json" in marker["files"]
    assert all((voice / "export" / name).is_file() for name in (*WHOLE, "adapter/adapter_config.json"))
    values = json.loads(files["adapter_config.json"])
    assert (values["base_model_name_or_path"], values["revision"]) == ("me/base", base)
    assert json.loads((voice / "export" / "adapter" / "adapter_config.json").read_text())["revision"] is None
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert {"lora", "tortoise-tts"} < set(data["tags"])
    sha256 = fingerprint(load_gpt(resolve_base(ModelConfig(base=f"me/base@{base}"))))
    for words in ("LoRA of rank 2", "me/base", base, sha256):
        assert words in card.text, words
    assert not any(str(tmp_path).encode() in data for data in files.values())
    assert push_run(voice).changed is False


def test_peft_reads_the_repository(voice):
    folder = pull_voice("me/voice")
    whole = load_gpt(resolve_base(ModelConfig(base="me/base")))
    merged = peft.PeftModel.from_pretrained(whole, folder).merge_and_unload()
    assert equal(merged.state_dict(), weights_of(voice / "export"))


def test_whole_and_alone_replace_each_other(hub, voice):
    push_run(voice, {"adapter_only": False})
    files = set(hub.repository("me/voice").files())
    assert {*WHOLE, "adapter/adapter_model.safetensors"} < files
    assert "adapter_model.safetensors" not in files
    assert ModelCard(hub.repository("me/voice").files()["README.md"].decode()).data.base_model_relation == "finetune"
    push_run(voice)
    assert not set(WHOLE) & set(hub.repository("me/voice").files())


def test_what_nobody_else_could_use_is_not_pushed(hub, tmp_path, tiny_base, base):
    folder = tmp_path / "a" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"model\.base .*a/folder is on this machine alone.*Push the base first"):
        check_shareable_base(str(folder))
    cfg = make_config(
        tmp_path, lora__rank=2, hub__adapter_only=True, hub__repo_id="me/v", hub__consent="I.", model__base=str(folder)
    )
    with pytest.raises(UserError, match="is on this machine alone"):
        check_before_training(cfg, Accelerator(cpu=True))
    whole = make_run(tmp_path, tiny_base, hub__repo_id="me/voice", hub__consent=CONSENT)
    with pytest.raises(UserError, match="on this machine alone"):
        push_run(whole, {"adapter_only": True})
    assert "me/voice" not in hub.repositories
    settings = {"model__base": f"me/base@{base}", "hub__repo_id": "me/voice", "hub__consent": CONSENT}
    trained_whole = make_run(tmp_path, tiny_base, value=6.0, name="other", **settings)
    with pytest.raises(UserError, match=r"trained all weights \(lora\.rank 0\)"):
        push_run(trained_whole, {"adapter_only": True})
    with pytest.raises(ValueError, match=r"hub\.adapter_only is true, but lora\.rank is 0"):
        make_config(tmp_path, hub__adapter_only=True)
    assert held_by_pushes(make_config(tmp_path, lora__rank=2, hub__adapter_only=True, hub__repo_id="a/b").hub) == (0, 0)


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_pulled_into_an_empty_cache_it_is_the_export_bit_for_bit(hub, voice, repository, tmp_path, monkeypatch):
    script = str(repository / "scripts" / "pull.py")
    done = subprocess.run(
        [sys.executable, script, "me/voice", str(tmp_path / "copy")],
        env=os.environ | {"HF_HOME": str(tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "It is an adapter to me/base@" in done.stdout
    copy = tmp_path / "copy"
    assert equal(weights_of(copy), weights_of(voice / "export"))
    for name in ("model.safetensors", "5_gpt.pth", "tokenizer.json", "mel_norms.safetensors", "dvae/model.safetensors"):
        assert (copy / name).read_bytes() == (voice / "export" / name).read_bytes(), name
    assert (copy / "adapter" / "adapter_model.safetensors").is_file()
    assert not (copy / "adapter_model.safetensors").exists()
    assert (copy / "conditioning" / "clip-1.wav").is_file()
    assert Voice.from_pretrained(copy, preview=True).latents.gpt.shape == (1, 64)
    # Without a network, out of that cache.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere" / "hub"))
    asked = len(hub.requests)
    gpt = load_gpt(resolve_base(ModelConfig(base="me/voice")))
    assert equal(gpt.state_dict(), weights_of(voice / "export"))
    assert len(hub.requests) == asked


def test_it_speaks_with_the_merged_weights(voice):
    spoken = Voice.from_pretrained("me/voice", preview=True, device="cpu", dtype=torch.float32)
    with spoken.chain.shelf.use("gpt") as gpt:
        assert equal(gpt.state_dict(), weights_of(voice / "export"))
        norms = load_file(voice / "export" / "mel_norms.safetensors")["mel_norms"]
        latent = gpt_latent([voice / "conditioning" / "clip-1.wav"], gpt, norms)
    torch.testing.assert_close(spoken.latents.gpt, latent)


def test_the_next_adapter_stands_on_it(hub, voice, base, tmp_path):
    commit = hub.repository("me/voice").branches["main"]
    files = resolve_base(ModelConfig(base="me/voice"))
    assert files.lineage == (f"me/voice@{commit}", f"me/base@{base}")
    assert equal(load_base_weights(files)[1], weights_of(voice / "export"))
    assert files.dvae_weights.parent.parent.name == base  # the adapter brings none
    child = make_adapter_run(tmp_path, "me/voice", "child", "me/child", lora__embeddings=True)
    push_run(child)
    values = json.loads(hub.repository("me/child").files()["adapter_config.json"])
    assert (values["base_model_name_or_path"], values["revision"]) == ("me/voice", commit)
    copy_voice(pull_voice("me/child"), tmp_path / "copy")
    assert equal(weights_of(tmp_path / "copy"), weights_of(child / "export"))
    from_scratch = resolve_base(ModelConfig(base="me/child", from_scratch=True))
    assert from_scratch.dvae_weights == files.dvae_weights
    assert load_gpt(from_scratch, True).config.hidden_size == 64


def test_what_stands_for_merged_weights_is_no_processors_rounding(voice, monkeypatch):
    files = resolve_base(ModelConfig(base="me/voice"))
    model = load_gpt(files)
    expected = fingerprint(model)
    with torch.no_grad():
        model.gpt.h[0].attn.c_attn.weight.mul_(1 + 1e-7)
    assert fingerprint(model) == expected
    assert fingerprint(load_gpt(files)) == expected
    shutil.copyfile(files.tokenizer, files.tokenizer.parent / "other.json")
    other = ModelConfig(base="me/voice", tokenizer=str(files.tokenizer.parent / "other.json"))
    assert fingerprint(load_gpt(resolve_base(other))) == expected  # the same content
    (files.tokenizer.parent / "other.json").write_text(files.tokenizer.read_text() + "\n")
    assert fingerprint(load_gpt(resolve_base(other))) != expected


def test_the_released_base_is_found_by_its_name(hub, voice, monkeypatch, tmp_path):
    """Nothing is fetched: what is asked for is looked at."""
    values = json.loads(hub.repository("me/voice").files()["adapter_config.json"])
    values |= {"base_model_name_or_path": "jbetker/tortoise-tts-v2", "revision": None}
    change(hub, adapter_config=json.dumps(values).encode())
    asked = []

    def fetch(names, weights_dir, **options):
        asked.append((sorted(names), str(weights_dir)))
        raise UserError("stop here")

    monkeypatch.setattr(pretrained, "fetch_released", fetch)
    with pytest.raises(UserError, match="stop here"):
        resolve_base(ModelConfig(base="me/voice", weights_dir=str(tmp_path)), dvae=False)
    assert asked == [(["autoregressive.pth", "mel_norms.pth", "tokenizer.json"], str(tmp_path))]


# --- what is refused --------------------------------------------------------------------------------------------------


def change(hub, repo_id="me/voice", **files):
    before = hub.repository(repo_id).files()
    names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
    hub.repository(repo_id).commit({**before, **{names.get(key, f"{key}.json"): data for key, data in files.items()}})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("peft_type", "PROMPT_TUNING", "peft_type 'PROMPT_TUNING'; expected 'LORA'"),
        ("r", 10**9, "r 1000000000; expected a whole number from 1 to 256"),
        ("r", 3, "tensors differ, first base_model.*instead of"),
        ("lora_alpha", float("inf"), "lora_alpha inf; expected a number above 0"),
        ("target_modules", ".*(a+)+$", "target_modules .*; expected layers out of c_attn"),
        ("target_modules", ["c_attn", "os.system"], "target_modules .*; expected layers out of c_attn"),
        ("target_modules", ["c_attn"], "tensors differ"),
        ("base_model_name_or_path", "/etc", "base_model_name_or_path '/etc'; expected a repository on the Hub"),
        ("base_model_name_or_path", "../../base", "expected a repository on the Hub"),
        ("base_model_name_or_path", None, "doesn't say which repository the adapter's base is in"),
        ("revision", "../x", r"revision '\.\./x'; expected a commit, branch or tag"),
        ("megatron_config", {"a": 1}, "megatron_config .*; expected nothing"),
        ("modules_to_save", ["mel_head"], r"modules_to_save \['mel_head'\]; expected nothing"),
        ("use_dora", True, "use_dora True; expected nothing"),
        ("invented_later", "x" * 1000, "invented_later 'x+\\.\\.\\.; expected nothing"),
        ("init_lora_weights", "pissa", "init_lora_weights 'pissa'; expected true or false"),
    ],
)
def test_a_config_that_says_anything_else_is_refused(hub, voice, key, value, sentence):
    values = json.loads(hub.repository("me/voice").files()["adapter_config.json"])
    change(hub, adapter_config=json.dumps(values | {key: value}).encode())
    with pytest.raises(UserError, match=sentence) as error:
        pull_voice("me/voice")
    assert "\n" not in str(error.value)


def tensors():
    """The pushed adapter's tensors and its header's metadata."""
    path = pull_voice("me/voice") / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def grown(found):
    key = next(iter(found))
    return found | {key: torch.zeros(7, 7)}


@pytest.mark.parametrize(
    ("make", "metadata", "sentence"),
    [
        (grown, {}, r"tensors differ, first .* \(\(7, 7\) instead of"),
        (lambda found: found | {"extra": torch.zeros(1)}, {}, r"1 of 16 tensors differ, first extra .*instead of noth"),
        (lambda found: dict(list(found.items())[1:]), {}, "1 of 16 tensors differ.*missing instead of"),
        (lambda found: {key: value.to(torch.int32) for key, value in found.items()}, {}, "I32 in .*16 or 32 bits"),
        (dict, {"base_sha256": "x"}, "doesn't say which weights it belongs to"),
        (dict, {"base_sha256": "0" * 64}, "trained on other weights than those of me/base@"),
    ],
)
def test_hostile_tensors_are_refused(hub, voice, make, metadata, sentence):
    found, before = tensors()
    change(hub, adapter_model=save(make(found), before | metadata))
    with pytest.raises(UserError, match=sentence) as error:
        load_gpt(resolve_base(ModelConfig(base="me/voice")))
    assert "\n" not in str(error.value)


def test_files_that_are_no_adapter_are_refused(hub, voice):
    found, metadata = tensors()
    change(hub, adapter_model=b"PK")
    with pytest.raises(UserError, match="not a sound safetensors file"):
        pull_voice("me/voice")
    change(hub, adapter_model=save(found | {next(iter(found)): next(iter(found.values())) * float("nan")}, metadata))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors doesn't fit the model.*NaN or infinite"):
        load_gpt(resolve_base(ModelConfig(base="me/voice")))
    change(hub, adapter_model=save(found, metadata), config=heads(hub, 8))
    with pytest.raises(UserError, match=r"config\.json names num_heads 8, and the base has 4"):
        load_gpt(resolve_base(ModelConfig(base="me/voice")))
    hub.repository("me/voice").commit(
        {name: data for name, data in hub.repository("me/voice").files().items() if name != "adapter_config.json"}
    )
    with pytest.raises(UserError, match="not a voice of this program: it has no model"):
        pull_voice("me/voice")


def heads(hub, number):
    values = json.loads(hub.repository("me/voice").files()["config.json"])
    return json.dumps(values | {"num_heads": number}).encode()


@pytest.mark.parametrize("what", ["gone", "another", "offline"])
def test_without_its_base_it_is_refused(hub, voice, base_files, what, tmp_path, monkeypatch):
    adapter = pull_voice("me/voice", cache_dir=tmp_path / "cache")
    cfg = ModelConfig(base=str(adapter))
    if what == "gone":
        del hub.repositories["me/base"]
        sentence = r"holds an adapter to me/base@\w+, and without that it is of no use: me/base is not on the Hub"
    elif what == "another":
        other = golden_gpt()
        with torch.no_grad():
            other.mel_head.bias[0] += 1e-3
        weights = save({key: value.contiguous() for key, value in other.state_dict().items()}, {"format": "pt"})
        commit = hub.repository("me/base").commit({**base_files, "model.safetensors": weights})
        values = json.loads(hub.repository("me/voice").files()["adapter_config.json"])
        change(hub, adapter_config=json.dumps(values | {"revision": commit}).encode())
        cfg = ModelConfig(base="me/voice")
        sentence = rf"trained on other weights than those of me/base@{commit} .*both together are no voice"
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        sentence = "HF_HUB_OFFLINE forbids asking the Hub. It is not in the cache either"
    with pytest.raises(UserError, match=sentence):
        load_gpt(resolve_base(cfg, cache_dir=tmp_path / "cache"))


def test_an_adapter_to_itself_ends(hub, voice):
    values = json.loads(hub.repository("me/voice").files()["adapter_config.json"])
    change(
        hub, adapter_config=json.dumps(values | {"base_model_name_or_path": "me/voice", "revision": "main"}).encode()
    )
    with pytest.raises(UserError, match="an adapter to an adapter, and so on, 8 times"):
        resolve_base(ModelConfig(base="me/voice"))


def test_a_folder_here_is_never_taken_for_the_base(hub, voice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(voice / "export", tmp_path / "me" / "base")
    folder = pull_voice("me/voice", cache_dir=tmp_path / "cache")
    files = resolve_base(ModelConfig(base=str(folder)), cache_dir=tmp_path / "cache")
    assert equal(load_gpt(files).state_dict(), weights_of(voice / "export"))


def test_a_checkpoint_is_no_base(voice):
    with pytest.raises(UserError, match="doesn't say where they are; give the export of its run"):
        resolve_base(ModelConfig(base=str(voice / "checkpoint-5")))
