import pytest
import torch
import torch.nn.functional as F

from tortoise_hf.data.collate import IGNORE_INDEX
from tortoise_hf.loss import gpt_loss, weighted_mean, weighted_mean_of_values


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_logits = torch.randn(2, 5, 7, generator=generator)
    mel_logits = torch.randn(2, 6, 9, generator=generator)
    text_targets = torch.randint(0, 7, (2, 5), generator=generator)
    mel_targets = torch.randint(0, 9, (2, 6), generator=generator)
    text_targets[1, 3:] = IGNORE_INDEX
    mel_targets[0, 4:] = IGNORE_INDEX
    return text_logits, mel_logits, text_targets, mel_targets


def test_sums_over_counts_are_the_usual_mean():
    text_logits, mel_logits, text_targets, mel_targets = case = random_case()
    sums = gpt_loss(*case)
    assert (int(sums.num_text), int(sums.num_mel)) == (8, 10)
    assert float(sums.text / sums.num_text) == pytest.approx(
        float(F.cross_entropy(text_logits.flatten(0, 1), text_targets.flatten())), abs=1e-6
    )
    total = weighted_mean(sums, sums.counts(), 0.01, 1.0)
    expected = 0.01 * F.cross_entropy(text_logits.flatten(0, 1), text_targets.flatten()) + F.cross_entropy(
        mel_logits.flatten(0, 1), mel_targets.flatten()
    )
    assert float(total) == pytest.approx(float(expected), abs=1e-6)
    assert weighted_mean_of_values(sums.values(), 0.01, 1.0)[2] == pytest.approx(float(expected), abs=1e-6)


def test_padding_counts_for_nothing():
    text_logits, mel_logits, text_targets, mel_targets = random_case()
    before = gpt_loss(text_logits, mel_logits, text_targets, mel_targets)
    mel_logits[0, 4:] = 1e4
    after = gpt_loss(text_logits, mel_logits, text_targets, mel_targets)
    assert torch.equal(before.mel, after.mel)


def test_a_micro_batch_without_targets_weighs_nothing():
    text_logits, mel_logits, text_targets, mel_targets = random_case()
    mel_logits.requires_grad_()
    sums = gpt_loss(text_logits, mel_logits, torch.full_like(text_targets, -100), torch.full_like(mel_targets, -100))
    loss = weighted_mean(sums, sums.counts(), 0.01, 1.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(mel_logits.grad, torch.zeros_like(mel_logits))


def test_half_precision_logits_are_summed_in_float32():
    text_logits, mel_logits, text_targets, mel_targets = random_case()
    sums = gpt_loss(text_logits.bfloat16(), mel_logits.bfloat16(), text_targets, mel_targets)
    assert sums.mel.dtype == torch.float32
