"""AdamW with its memory in 8 bits: what it keeps, that it resumes exactly, and what happens where it can't be had."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from safetensors.torch import load_file
from test_loop import run_training

from tortoise_hf import optim
from tortoise_hf.config import OptimConfig
from tortoise_hf.optim import build_optimizer, settle_optimizer
from tortoise_hf.optimizer_state import MOMENT_BYTES, checkpoint_bytes


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs the 8bit extra")


def test_it_keeps_two_bytes_per_weight_and_moves_like_adamw(bitsandbytes):
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(64, 1024, generator=generator), torch.randn(64, 1024, generator=generator)
    moved = {}
    for kind in ("adamw", "adamw_8bit"):
        layer = torch.nn.Linear(1024, 64, bias=False)
        layer.weight.data = start.clone()
        optimizer = build_optimizer(layer, OptimConfig(optimizer=kind, learning_rate=1e-2))
        for _ in range(5):
            layer.weight.grad = gradient.clone()
            optimizer.step()
        moved[kind] = layer.weight.detach() - start
        state = optimizer.state[layer.weight].items()
        tensors = [value for name, value in state if torch.is_tensor(value) and not name.startswith("qmap")]
        kept = sum(value.numel() * value.element_size() for value in tensors)  # without its code books
        assert kept == pytest.approx(MOMENT_BYTES[kind] * start.numel(), rel=0.01)
    apart = (moved["adamw"] - moved["adamw_8bit"]).norm() / moved["adamw"].norm()
    assert apart < 0.05


def test_a_resumed_run_is_exact(bitsandbytes, tmp_path):
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
        cfg = make_config(folder, optim__optimizer="adamw_8bit", training__save_steps=2)
        run_training(cfg)
    shutil.rmtree(broken / "run" / "checkpoint-6")
    run_training(cfg, resume=True)
    one, two = (folder / "run" / "checkpoint-6" for folder in (whole, broken))
    weights, again = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (one, two)]
    found = [torch.cat([v.flatten().float() for v in tensors_in(state)]) for state in states]
    assert torch.equal(*found)
    num_weights = sum(tensor.numel() for tensor in weights.values())
    size = sum((one / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert size < 1.4 * checkpoint_bytes(num_weights, "full", "adamw_8bit")  # code books and small tensors


def tensors_in(value):
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one)]
    return [value] if torch.is_tensor(value) else []


@pytest.mark.parametrize(("first", "then"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_going_on_with_the_other_begins_its_averages_anew_and_says_so(bitsandbytes, tmp_path, capsys, first, then):
    run_training(make_config(tmp_path, optim__optimizer=first, training__save_steps=3), max_steps=3)
    cfg = make_config(tmp_path, optim__optimizer=then, training__save_steps=3)
    state, _ = run_training(cfg, max_steps=6, resume=True)
    assert state.global_step == 6
    assert f"checkpoint-3 holds the averages of {first}, which {then} can't read" in capsys.readouterr().out


def test_where_it_works_it_is_taken(bitsandbytes, tmp_path, capsys):
    cfg = make_config(tmp_path, optim__optimizer="adamw_8bit")
    assert settle_optimizer(cfg, Accelerator(cpu=True)) is cfg
    assert capsys.readouterr().out == ""


def no_package():
    raise ImportError("No module named 'bitsandbytes'")


def no_kernel():
    raise RuntimeError("no kernel for this device\nlong story")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (no_package, r"isn't installed: pip install 'tortoise_hf\[8bit\]'"),
        (no_kernel, "fails on cpu: no kernel for this device"),
    ],
)
def test_where_it_cannot_be_had_a_line_says_what_happens_instead(tmp_path, capsys, monkeypatch, found, reason):
    monkeypatch.setattr(optim, "_bitsandbytes", found)
    cfg = settle_optimizer(make_config(tmp_path, optim__optimizer="adamw_8bit"), Accelerator(cpu=True))
    assert cfg.optim.optimizer == "adamw"
    assert isinstance(build_optimizer(golden_gpt(), cfg.optim), torch.optim.AdamW)
    line = capsys.readouterr().out
    assert re.search(f"adamw_8bit can't be had .*{reason}.*; this run takes adamw", line)
