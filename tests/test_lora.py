"""Adapters: what trains, what is kept, and that a merged model is the adapted one."""

from __future__ import annotations

import json
import shutil
import threading

import peft
import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from hub.voice_maker import CONSENT, LOG, make_run
from huggingface_hub import HfApi
from safetensors.torch import load_file
from test_loop import run_training
from transformers import TrainerState

from tortoise_hf.checkpoint import save_checkpoint
from tortoise_hf.config import LoraConfig, OptimConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export_run import export_run
from tortoise_hf.hub.publish import HUB_DIR
from tortoise_hf.hub.pull import pull_voice
from tortoise_hf.hub.voice_folder import link_file
from tortoise_hf.hub.worker import push_checkpoint
from tortoise_hf.lora import adapter_names, add_adapter, merge_adapter, num_weights, save_adapter
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import load_trained
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.run import open_run

EVERYWHERE = LoraConfig(rank=4, alpha=4, conditioning_encoder=True, embeddings=True, heads=True)


def adapted(cfg=EVERYWHERE, dropout=0.0):
    """The golden GPT with an adapter whose matrices all do something."""
    model = golden_gpt(dropout)
    add_adapter(model, cfg, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def logits(model):
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(1, 255, (2, 9), generator=generator)
    mel = torch.randint(0, 256, (2, 14), generator=generator)
    with torch.no_grad():
        output = model(text, mel, conditioning_mel=torch.randn(2, 2, 80, 20, generator=generator))
    return torch.cat([output.text_logits.flatten(), output.mel_logits.flatten()])


def save(model, folder):
    folder.mkdir()
    state = model.state_dict()
    save_adapter(model, folder, {name: state[name] for name in adapter_names(model)})
    return folder


# --- what it is -------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_draws_no_random_numbers():
    model, expected = golden_gpt(), logits(golden_gpt())
    before = torch.get_rng_state()
    add_adapter(model, EVERYWHERE, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(model.eval()), expected)


def test_the_seed_decides_where_it_begins():
    states = []
    for seed in (0, 0, 1):
        model = golden_gpt()
        add_adapter(model, EVERYWHERE, seed)
        states.append({name: model.state_dict()[name] for name in adapter_names(model)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("part", ["conditioning_encoder", "embeddings", "heads"])
def test_parts_are_adapted_where_they_are_asked_for(part):
    def parts(**settings):
        model = golden_gpt()
        add_adapter(model, LoraConfig(rank=2, **settings), seed=0)
        return {name.split(".lora_")[0] for name in adapter_names(model)}

    own = {f"gpt.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                                                    "mlp.c_proj")}  # fmt: skip
    attention = {f"conditioning_encoder.attn.{n}.{name}" for n in range(6) for name in ("qkv", "proj_out")}
    others = {
        "conditioning_encoder": {"conditioning_encoder.init", *attention},
        "embeddings": {"text_embedding", "mel_embedding", "text_pos_embedding.emb", "mel_pos_embedding.emb"},
        "heads": {"text_head", "mel_head"},
    }
    assert parts() == own
    assert parts(**{part: True}) == own | others[part]


def test_weights_are_counted():
    total = sum(value.numel() for value in golden_gpt().parameters())
    assert num_weights(golden_gpt()) == (total, total)
    model = adapted(LoraConfig(rank=4))
    assert num_weights(model) == (total, 4 * 2 * 64 * (4 + 2 + 5 + 5))  # 2 blocks of 64; sides of their 4 matrices


# --- training ---------------------------------------------------------------------------------------------------------


def test_only_the_adapter_trains_and_all_of_it_does(tmp_path):
    cfg = make_config(tmp_path, training__save_steps=3)
    model = golden_gpt()
    add_adapter(model, EVERYWHERE, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_training(cfg, model=model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(adapter_names(model))


def test_a_checkpoint_holds_the_adapter_alone_and_resume_is_exact(tmp_path):
    def start():
        model = golden_gpt(dropout=0.1)
        add_adapter(model, LoraConfig(rank=2, heads=True, dropout=0.1), seed=0)
        return model

    whole, broken = (make_config(tmp_path / name, training__save_steps=2) for name in ("whole", "broken"))
    for cfg in (whole, broken):
        cfg_dir = tmp_path / ("whole" if cfg is whole else "broken")
        cfg_dir.mkdir()
    run_training(whole, max_steps=6, model=start())
    run_training(broken, max_steps=6, model=start())
    folder = tmp_path / "broken" / "run"
    shutil.rmtree(folder / "checkpoint-6")
    run_training(broken, max_steps=6, model=start(), resume=True)
    files = {path.name for path in (folder / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "optimizer.pt"} < files
    assert "model.safetensors" not in files
    one, two = (tmp_path / name / "run" / "checkpoint-6" for name in ("whole", "broken"))
    weights, again = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
    assert len(weights) == 2 * (2 * 4 + 2)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    moments, moments_again = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (one, two))
    assert len(moments) == len(weights)
    assert all(torch.equal(moments[i][key], moments_again[i][key]) for i in moments for key in moments[i])


# --- files ------------------------------------------------------------------------------------------------------------


def test_merged_is_adapted(tmp_path):
    model = adapted()
    assert float((logits(model) - logits(golden_gpt())).abs().max()) > 0.05
    merged = merge_adapter(golden_gpt(), save(model, tmp_path / "adapter"))
    assert type(merged) is TortoiseGPT
    assert merged.state_dict().keys() == golden_gpt().state_dict().keys()
    assert all(value.requires_grad for value in merged.parameters())
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


def test_peft_reads_the_files_itself(tmp_path):
    model = adapted()
    folder = save(model, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(golden_gpt(), folder).eval()
    assert torch.equal(logits(read), logits(model))
    values = json.loads((folder / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["base_model_name_or_path"]) == ("LORA", 4, None)
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    folder = save(adapted(), tmp_path / "adapter")
    other = golden_gpt()
    with torch.no_grad():
        other.mel_head.bias[0] += 1e-3
    with pytest.raises(UserError, match=r"trained on other weights than those that model\.base names now"):
        merge_adapter(other, folder)


@pytest.fixture
def run(tmp_path, tiny_base):
    """A run's folder with an adapter as its checkpoint 5; the run was a whole model's before."""
    folder = make_run(
        tmp_path, tiny_base, hub__repo_id="me/voice", hub__consent=CONSENT, lora__rank=4, model__from_scratch=False
    )
    model = adapted()
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_lr_scheduler(optimizer, OptimConfig(), max_steps=10)
    state = TrainerState(global_step=5, best_global_step=5, best_model_checkpoint="checkpoint-5", log_history=LOG)
    save_checkpoint(folder, Accelerator(cpu=True), model, optimizer, scheduler, state)
    return folder


def test_the_export_is_whole_and_holds_the_adapter_besides(run, tmp_path):
    report = export_run(run, tmp_path / "out")
    assert report.self_test.passed
    assert "of 74 tensors changed" in report.self_test.findings["difference from the base"]
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} < set(report.files)
    whole = TortoiseGPT.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(whole), logits(adapted()), atol=1e-5, rtol=1e-5)
    again = merge_adapter(golden_gpt(), tmp_path / "out" / "adapter")
    assert torch.equal(logits(again.eval()), logits(whole))


def test_a_checkpoint_is_pushed_while_the_run_goes_on(run, hub):
    staging = run / HUB_DIR / "step-5"
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json", "trainer_state.json"):
        link_file(run / "checkpoint-5" / name, staging / "checkpoint" / name)
    (staging / "step.json").write_text(json.dumps({"step": 5, "lineage": ["the golden GPT"]}))
    push_checkpoint(run, staging, threading.Event())
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model.safetensors"} < set(
        HfApi().list_repo_files("me/voice")
    )
    pulled = TortoiseGPT.from_pretrained(pull_voice("me/voice")).eval()
    torch.testing.assert_close(logits(pulled), logits(adapted()), atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_only_as_it_began(tmp_path):
    def open_it(**settings):
        cfg = make_config(tmp_path, **settings)
        return open_run(cfg, Accelerator(cpu=True), {"a": "1"}, 5)

    open_it(lora__rank=4)
    with pytest.raises(UserError, match=r"was begun with lora\.rank 4, and now it is 8"):
        open_it(lora__rank=8)
    with pytest.raises(UserError, match=r"was begun with lora\.rank 4, and now it is 0"):
        open_it()
    open_it(lora__rank=4, lora__dropout=0.2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["config"]["lora"]  # as versions wrote it that had no adapters
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"was begun with lora\.rank 0, and now it is 4"):
        open_it(lora__rank=4)
    open_it()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora__rank": -1}, "lora.rank must lie between 1 and 256"),
        ({"lora__rank": 300}, "lora.rank must lie between 1 and 256"),
        ({"lora__rank": 4, "lora__alpha": 0.0}, "lora.alpha must be above 0"),
        ({"lora__rank": 4, "lora__dropout": 1.0}, r"lora.dropout must be in \[0, 1\)"),
        ({"lora__heads": True}, "lora.heads is true, but lora.rank is 0"),
        ({"lora__rank": 4, "model__from_scratch": True}, "model.from_scratch is true and lora.rank above 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


def test_a_whole_checkpoint_is_loaded_as_ever(tmp_path):
    golden_gpt().save_pretrained(tmp_path)
    assert torch.equal(logits(load_trained(tmp_path, files=None).eval()), logits(golden_gpt()))
