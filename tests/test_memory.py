"""Memory without a GPU: figures that follow from the sizes, and what makes them smaller."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import golden_gpt, make_config

from tortoise_hf.errors import UserError
from tortoise_hf.memory import _Tally, memory_table, step_memory


def memory(tmp_path, precision="no", size=2, checkpointing=False, **settings):
    return step_memory(make_config(tmp_path, **settings), golden_gpt(0.1).config, precision, size, checkpointing)


def test_weights_gradients_and_optimizer_are_counted(tmp_path):
    weights = sum(value.numel() for value in golden_gpt().parameters())
    full, eight = memory(tmp_path), memory(tmp_path, optim__optimizer="adamw_8bit")
    assert (full.weights, full.gradients, full.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    assert eight.optimizer == pytest.approx(full.optimizer / 4, rel=0.02)
    assert eight.total == full.total - full.optimizer + eight.optimizer
    assert full.total == full.weights + full.gradients + full.optimizer + full.activations


def test_an_adapter_takes_less_than_all_weights(tmp_path):
    full, lora = memory(tmp_path), memory(tmp_path, lora__rank=4)
    adapter = 4 * 2 * 64 * (4 + 2 + 5 + 5)
    assert (lora.weights, lora.gradients, lora.optimizer) == (full.weights + 4 * adapter, 4 * adapter, 8 * adapter)
    assert lora.activations < full.activations  # the conditioning encoder keeps nothing for a backward pass
    assert lora.total < 0.6 * full.total


def test_what_makes_activations_smaller(tmp_path):
    one, two, four = (memory(tmp_path, size=size).activations for size in (1, 2, 4))
    assert two - one == pytest.approx((four - two) / 2, rel=0.1)
    assert memory(tmp_path, size=4, checkpointing=True).activations < two
    assert memory(tmp_path, size=4, data__max_samples=20_000, data__max_text_ids=10).activations < four
    assert memory(tmp_path, "fp16", size=4).activations < four


def test_what_the_forward_pass_leaves_is_what_autograd_keeps():
    model, hidden, kept = golden_gpt(), torch.randn(2, 30, 64, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    tally = _Tally()
    there = [tally._count(tensor).untyped_storage()._cdata for tensor in (*model.parameters(), hidden)]
    before = tally.live
    with tally, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = model.gpt.h[0].mlp(hidden)
    kept[answer.untyped_storage()._cdata] = answer.untyped_storage().nbytes()
    assert tally.live - before == sum(size for key, size in kept.items() if key not in there)


def test_the_table_shows_what_is_left_open(tmp_path, tiny_base):
    settings = {"model__base": str(tiny_base), "model__gradient_checkpointing": None, "training__micro_batch_size": 3}
    lines = memory_table(make_config(tmp_path, **settings), "fp16").splitlines()
    assert "all weights, adamw, mixed precision fp16" in lines[0]
    assert "Computed, not measured" in lines[0]
    assert [line.split()[:2] for line in lines[2:]] == [["3", "no"], ["3", "yes"]]
    settings |= {"model__gradient_checkpointing": True, "training__micro_batch_size": None, "lora__rank": 2}
    lines = memory_table(make_config(tmp_path, **settings), "no").splitlines()
    assert "an adapter of rank 2" in lines[0]
    assert [line.split()[:2] for line in lines[2:]] == [[size, "yes"] for size in ("1", "2", "4", "8")]
    with pytest.raises(UserError, match=r"model\.base me/voice is no folder"):
        memory_table(make_config(tmp_path, model__base="me/voice"), "no")


def test_script(repository, tmp_path, tiny_base, capsys):
    spec = importlib.util.spec_from_file_location("memory_script", repository / "scripts" / "memory.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = ["--training.micro_batch_size", "2", "--model.gradient_checkpointing", "true", "--mixed_precision", "bf16"]
    recipe = ["--config", str(repository / "configs" / "my_voice.yaml"), "--model.base", str(tiny_base)]
    script.main([*recipe, *flags])
    assert "mixed precision bf16" in capsys.readouterr().out
