"""Sums, counts and means of the two losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden_gpt

from tortoise_hf.data.collate import Collator, Example
from tortoise_hf.loss import gpt_loss, weighted_mean, weighted_mean_of_values

WEIGHTS = (0.01, 1.0)


def clip(num_text_ids, num_codes, weight=1):
    rng = np.random.default_rng(num_codes)
    conditioning_mel = rng.standard_normal((1, 80, 10), dtype=np.float32)
    return Example(rng.integers(2, 255, num_text_ids), rng.integers(0, 256, num_codes), conditioning_mel, 0, weight)


def test_sums_over_counts_are_the_usual_mean():
    model = golden_gpt()
    batch = Collator.for_model(model.config)([clip(7, 9)])
    sums = gpt_loss(model, batch)
    assert (sums.num_text, sums.num_mel) == (8, 10)
    assert sums.counts().tolist() == [8, 10]
    with torch.no_grad():
        output = model(batch.text_inputs, batch.mel_inputs, conditioning_mel=batch.conditioning_mel)
    text = F.cross_entropy(output.text_logits[0], batch.text_targets[0])  # which leaves out what isn't asked
    mel = F.cross_entropy(output.mel_logits[0], batch.mel_targets[0])
    found = weighted_mean_of_values(sums.values(), *WEIGHTS)
    assert found == pytest.approx([float(text), float(mel), float(0.01 * text + mel)], abs=1e-5)
    assert float(weighted_mean(sums, sums.counts(), *WEIGHTS).detach()) == pytest.approx(found[2], abs=1e-12)


def test_counts_may_be_those_of_a_whole_step():
    model = golden_gpt()
    collate = Collator.for_model(model.config)
    both = gpt_loss(model, collate([clip(7, 9), clip(3, 20)]))
    parts = [gpt_loss(model, collate([one])) for one in (clip(7, 9), clip(3, 20))]
    means = [weighted_mean(one, both.counts(), *WEIGHTS) for one in (both, *parts)]
    assert float(means[1] + means[2]) == pytest.approx(float(means[0]), abs=1e-6)


def test_a_micro_batch_without_targets_weighs_nothing():
    model = golden_gpt()
    sums = gpt_loss(model, Collator.for_model(model.config)([clip(7, 9, weight=0)]))
    loss = weighted_mean(sums, sums.counts(), *WEIGHTS)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name}: processes exchange gradients of all weights"
        assert not parameter.grad.any()


@torch.no_grad()
def test_sums_are_float64_whatever_the_model_computes_in():
    model = golden_gpt()
    batch = Collator.for_model(model.config)([clip(7, 9)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = gpt_loss(model, batch)
    assert (sums.text.dtype, sums.mel.dtype, sums.values().dtype) == (torch.float64,) * 3
