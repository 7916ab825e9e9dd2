"""Measuring on a tiny model: what it reports, and that it leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from test_loop import RandomExamples

from tortoise_hf.data.collate import Collator
from tortoise_hf.measure import measure


def measure_it(tmp_path, model, share=4, num_clips=6, **settings):
    open_settings = {"training__micro_batch_size": None, "model__gradient_checkpointing": None} | settings
    cfg = make_config(tmp_path, **open_settings)
    examples = RandomExamples(num_clips)
    return measure(
        cfg, Accelerator(cpu=True), model, examples, examples.lengths, Collator.for_model(model.config), share
    )


def test_it_leaves_no_trace(tmp_path):
    """Weights, gradients, mode and random numbers are those of a run that wasn't measured."""
    model = golden_gpt(dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)
    random_state = torch.get_rng_state()
    measure_it(tmp_path, model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert np.random.rand() == np.random.RandomState(3).rand()
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_it_reports_time_and_memory(tmp_path):
    model = golden_gpt()
    found = measure_it(tmp_path, model)
    assert found.device == "cpu"
    assert [(trial.micro_batch_size, trial.gradient_checkpointing) for trial in found.trials] == [
        (1, False), (2, False), (4, False)]  # fmt: skip
    assert found.optimizer_bytes == 8 * sum(parameter.numel() for parameter in model.parameters())
    assert 0 < found.seconds_per_clip < 1
    assert found.fixed_bytes < found.usable_bytes
    assert all(trial.peak_bytes > 2**20 for trial in found.trials)


def test_a_size_of_the_users_is_the_only_one_tried(tmp_path):
    found = measure_it(tmp_path, golden_gpt(), training__micro_batch_size=3, model__gradient_checkpointing=True)
    assert [(trial.micro_batch_size, trial.gradient_checkpointing) for trial in found.trials] == [(3, True)]


def test_fewer_clips_than_the_micro_batch(tmp_path):
    found = measure_it(tmp_path, golden_gpt(), num_clips=1, share=1)
    assert [trial.micro_batch_size for trial in found.trials] == [1]
    assert found.seconds_per_clip > 0


def test_memory_that_runs_out_is_not_the_end(tmp_path, monkeypatch):
    """Simulated: every micro-batch of more than 2 clips fails unless activations are recomputed."""
    model = golden_gpt()
    forward = type(model).forward

    def limited(self, *args, **kwargs):
        recomputing = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        if len(kwargs["text_inputs"]) > 2 and not recomputing:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    found = measure_it(tmp_path, model)
    sizes = [(t.micro_batch_size, t.gradient_checkpointing, t.peak_bytes is None) for t in found.trials]
    assert sizes == [(1, False, False), (2, False, False), (4, False, True), (1, True, False), (2, True, False),
                     (4, True, False)]  # fmt: skip
    assert found.seconds_per_clip > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_grows_with_the_micro_batch(tmp_path):
    cfg = make_config(tmp_path, training__micro_batch_size=None, model__gradient_checkpointing=None)
    model, examples = golden_gpt(), RandomExamples(40)
    found = measure(cfg, Accelerator(), model, examples, examples.lengths, Collator.for_model(model.config), 32)
    peaks = [trial.peak_bytes for trial in found.trials]
    assert [trial.micro_batch_size for trial in found.trials] == [1, 2, 4, 8, 16, 32]
    assert peaks == sorted(peaks)
    assert found.device == "cuda"
