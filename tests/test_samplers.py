"""Samplers: golden schedule, predictions and loops; the solver against a problem whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from chain_models import golden_diffusion

from tortoise_hf.audio import denormalize_mel_24k
from tortoise_hf.samplers import (
    SAMPLERS,
    DiffusionSettings,
    Schedule,
    ancestral,
    ancestral_prediction,
    ddim,
    dpm_solver,
    guided_network,
    sample_mel,
)

COMBOS = [("cf0_5", 5, 0.0), ("cf1_4", 4, 2.0)]


@pytest.fixture(scope="module")
def golden():
    return golden_diffusion()


@pytest.fixture(scope="module")
def calm(golden):
    """The golden model with an output so small that the loops stay off the clamp."""
    model, tensors = golden_diffusion()
    with torch.no_grad():
        model.out[2].weight *= 0.005
        model.out[2].bias *= 0.005
    return model, tensors


def last(steps):
    *_, mel = steps
    return mel


@pytest.mark.parametrize("steps", [30, 80, 200])
def test_golden_timesteps(golden, steps):
    assert Schedule(steps).timesteps.tolist() == golden[1][f"out.space_timesteps_{steps}"].tolist()


@pytest.mark.parametrize("combo, steps, guidance", COMBOS)
def test_golden_schedule(golden, combo, steps, guidance):
    schedule = Schedule(steps)
    assert schedule.timesteps.tolist() == golden[1][f"out.timestep_map_{combo}"].tolist()
    torch.testing.assert_close(schedule.betas, golden[1][f"out.betas_{combo}"], atol=1e-12, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("combo, steps, guidance", COMBOS)
def test_golden_predictions(golden, combo, steps, guidance):
    model, tensors = golden
    schedule = Schedule(steps)
    network = guided_network(model, tensors["out.timestep_independent"], schedule, guidance)
    for index in (0, 1, steps - 1):
        prediction = ancestral_prediction(0.3 * tensors["in.noise"], index, network, schedule)
        expected = {key: tensors[f"out.pmv_{combo}_i{index}.{key}"] for key in ("mean", "log_variance", "pred_xstart")}
        # The noisiest level has 150 times more noise than signal, and so have its rounding errors.
        atol = 1e-4 if index < steps - 1 else 1e-3
        torch.testing.assert_close(prediction.clean, expected["pred_xstart"], atol=atol, rtol=0)
        torch.testing.assert_close(prediction.mean, expected["mean"], atol=1e-4, rtol=0)
        torch.testing.assert_close(prediction.log_variance, expected["log_variance"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("combo, steps, guidance", COMBOS)
def test_golden_loops(calm, combo, steps, guidance):
    model, tensors = calm
    schedule = Schedule(steps)
    network = guided_network(model, tensors["out.timestep_independent"], schedule, guidance)
    noises = iter(tensors[f"in.loop_step_noise_{combo}"])
    mel = last(ancestral(tensors["in.loop_noise"], network, schedule, noises))
    torch.testing.assert_close(mel, tensors[f"out.p_sample_loop_{combo}"], atol=1e-4, rtol=0)
    expected = tensors[f"out.p_sample_loop_{combo}.denorm"]
    torch.testing.assert_close(denormalize_mel_24k(mel), expected, atol=1e-3, rtol=0)
    mel = last(ddim(tensors["in.loop_noise"], network, schedule))
    torch.testing.assert_close(mel, tensors[f"out.ddim_eta0_{combo}"], atol=1e-4, rtol=0)


WEIGHTS, MEANS, SIZES = (torch.tensor(v, dtype=torch.float64) for v in ((0.3, 0.7), (-0.6, 0.3), (0.15, 0.1)))


def mixture_network(schedule):
    """The perfect network for data out of a mixture of two Gaussians: its noise prediction has a closed form."""

    def predict(mel, index):
        alpha = float(schedule.alphas_cumprod[index])
        signal, variance = math.sqrt(alpha), alpha * SIZES**2 + 1 - alpha
        distance = mel.unsqueeze(-1) - signal * MEANS
        share = (WEIGHTS.log() - distance**2 / variance / 2 - variance.log() / 2).softmax(-1)
        clean = (share * (MEANS + signal * SIZES**2 / variance * distance)).sum(-1)
        return (mel - signal * clean) / math.sqrt(1 - alpha), torch.zeros_like(mel)

    return predict


def mixture_run(sampler, steps, spacing):
    schedule = Schedule(steps, spacing)
    mel = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64).view(1, 1, -1)
    return last(sampler(mel, mixture_network(schedule), schedule))


def test_solver_finds_the_exact_answer_in_fewer_steps():
    """Against all 4,000 levels of DDIM, which follows the flow exactly up to its step width."""
    exact = mixture_run(ddim, 4000, "even")

    def error(sampler, steps, spacing):
        return float((mixture_run(sampler, steps, spacing) - exact).abs().mean())

    for steps in (10, 20, 40):
        solver = error(dpm_solver, steps, "quadratic")
        assert solver < 0.4 * error(ddim, steps, "even")
        assert solver < 0.5 * error(dpm_solver, steps, "even")
    assert error(dpm_solver, 20, "quadratic") < error(ddim, 80, "even")
    # Second order: half the step width, about a quarter of the error.
    assert error(dpm_solver, 80, "quadratic") < 0.45 * error(dpm_solver, 40, "quadratic")
    assert error(dpm_solver, 160, "quadratic") < 1e-3


def test_levels_are_distinct_and_reach_both_ends():
    for spacing in ("even", "quadratic"):
        for steps in (2, 3, 30, 400, 4000):
            timesteps = Schedule(steps, spacing).timesteps
            assert timesteps[0] == 0
            assert timesteps[-1] == 3999
            assert len(timesteps) == steps
            assert (timesteps.diff() > 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_is_repeatable(calm, sampler):
    model, tensors = calm
    settings = DiffusionSettings(sampler=sampler, steps=3)
    calls = []
    first, second, other = (
        sample_mel(
            model,
            tensors["out.timestep_independent"],
            settings,
            torch.Generator().manual_seed(seed),
            lambda: calls.append(1),
        )
        for seed in (1, 1, 2)
    )
    assert first.shape == (1, 100, tensors["out.timestep_independent"].shape[2])
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(calls) == 9


def test_wrong_settings_are_refused(calm):
    model, tensors = calm
    with pytest.raises(ValueError, match="ancestral, ddim, dpm"):
        sample_mel(model, tensors["out.timestep_independent"], DiffusionSettings(sampler="euler"), torch.Generator())
    with pytest.raises(ValueError, match="between 2 and 4000"):
        Schedule(1)
