"""Exporting a run again: which checkpoint is meant, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from transformers import TrainerState

from tortoise_hf.checkpoint import save_checkpoint
from tortoise_hf.config import OptimConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export_run import export_run, find_trained
from tortoise_hf.models.checkpoint_formats import read_gpt_weights
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.optim import build_lr_scheduler, build_optimizer


def save_step(run, model, step, best=None):
    """A checkpoint of that step; its weights carry the step's number."""
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_lr_scheduler(optimizer, OptimConfig(), max_steps=10)
    with torch.no_grad():
        model.final_norm.bias.fill_(step)
    state = TrainerState(global_step=step, best_model_checkpoint=best, log_history=[{"eval_loss": 3.0, "step": step}])
    save_checkpoint(run, Accelerator(cpu=True), model, optimizer, scheduler, state)


@pytest.fixture
def run(tmp_path, tiny_base):
    """A run of the golden GPT with checkpoints 5 and 10; 5 is the best."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    golden_gpt().save_pretrained(base)
    cfg = make_config(tmp_path, model__base=str(base))
    folder = tmp_path / "run"
    model = golden_gpt()
    save_step(folder, model, 5, best="checkpoint-5")
    save_step(folder, model, 10, best="checkpoint-5")
    (folder / "run.json").write_text(json.dumps({"config": cfg.to_dict(), "num_train_clips": 7}))
    return folder


def step_of(path):
    return read_gpt_weights(path)["final_norm.bias"].unique().tolist()


def test_best_checkpoint_of_a_run_is_taken(run, tmp_path):
    report = export_run(run, tmp_path / "out")
    assert report.step == 5
    assert step_of(tmp_path / "out" / "5_gpt.pth") == [5.0]
    assert TortoiseGPT.from_pretrained(tmp_path / "out").final_norm.bias.unique().tolist() == [5.0]
    assert "tensors changed" in report.self_test.findings["difference from the base"]
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert (summary["step"], summary["num_train_clips"]) == (5, 7)
    assert summary["evaluations"] == [{"eval_loss": 3.0, "step": 5}]


def test_newest_checkpoint_is_taken_without_evaluations(run, tmp_path):
    save_step(run, golden_gpt(), 15)
    assert find_trained(run).step == 15


def test_named_checkpoint_is_taken(run, tmp_path):
    report = export_run(run / "checkpoint-10", tmp_path / "out", dtype="float16", attention_buffers=False)
    assert step_of(tmp_path / "out" / "10_gpt.pth") == [10.0]
    assert report.weights_file == "10_gpt.pth"


def test_damaged_checkpoint_is_refused(run, tmp_path):
    weights = run / "checkpoint-5" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="checkpoint-5 is damaged"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["empty folder", "run without checkpoints", "checkpoint alone", "nothing"])
def test_folders_that_are_no_run_are_named(run, tmp_path, what):
    folder = tmp_path / "folder"
    if what == "empty folder":
        folder.mkdir()
    elif what == "run without checkpoints":
        folder.mkdir()
        shutil.copyfile(run / "run.json", folder / "run.json")
    elif what == "checkpoint alone":
        shutil.copytree(run / "checkpoint-5", folder)
    expected = {"run without checkpoints": "without a checkpoint", "checkpoint alone": "outside its run"}
    with pytest.raises(UserError, match=expected.get(what, "neither a run's folder")):
        find_trained(folder)


@pytest.fixture
def script(repository):
    """main of scripts/export.py."""
    spec = importlib.util.spec_from_file_location("export_script", repository / "scripts" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_script_passes_its_options_on(script, run, tmp_path, capsys):
    arguments = [str(run), str(tmp_path / "out"), "--dtype", "float16", "--no-attention-buffers"]
    script(arguments)
    written = torch.load(tmp_path / "out" / "5_gpt.pth", weights_only=True)
    assert len(written) == 74
    assert written["mel_head.weight"].dtype == torch.float16
    shown = capsys.readouterr().out
    assert "key table: 74 keys, named as published, in sizes of its own" in shown
    with pytest.raises(SystemExit) as stop:
        script(arguments)
    assert stop.value.code == 1
    assert "--overwrite" in capsys.readouterr().err
    script([*arguments[:2], "--overwrite"])
    assert len(torch.load(tmp_path / "out" / "5_gpt.pth", weights_only=True)) == 78
