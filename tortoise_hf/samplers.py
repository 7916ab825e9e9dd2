"""From noise to a mel spectrogram: the diffusion model's schedule and three ways along it.

`ancestral` is TorToiSe's own loop and the reference, `ddim` its deterministic cousin, `dpm++2m` (DPM-Solver++, second
order, multistep) the one that needs the fewest steps. All three run on the schedule the network was trained with,
respaced to fewer of its 4,000 noise levels, and use TorToiSe's guidance.
"""

# B batch (always 1) · M mel bins · F mel frames

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tortoise_hf.models.diffusion import NUM_TIMESTEPS, DiffusionDecoder

BETAS = (2.5e-5, 5e-3)
"""Noise added at the first and the last level: 0.0001 and 0.02 for 1,000 levels, scaled to 4,000."""
SAMPLERS = ("ancestral", "ddim", "dpm++2m")


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """How a mel is made. The defaults are those of tortoise-tts, but for the number of steps, which presets choose."""

    sampler: str = "ancestral"
    """One of `SAMPLERS`."""
    steps: int = 100
    """Calls of the network (two at once with guidance); at least 2."""
    guidance: float = 2.0
    """How far to exaggerate what the conditioning changes, at the last step; falls to 0 towards the first. 0 is off."""
    temperature: float = 1.0
    """Size of the starting noise."""


@dataclass(frozen=True)
class Prediction:
    """What the network makes of a noisy mel at one step."""

    clean: torch.Tensor
    """(B, M, F) the mel it sees in it, clamped to [-1, 1]."""
    mean: torch.Tensor
    """(B, M, F) mean of the next, less noisy mel."""
    log_variance: torch.Tensor
    """(B, M, F) logarithm of its variance."""


class Schedule:
    """Some of the 4,000 noise levels and the quantities that follow from them; float64 on the CPU.

    Attributes:
        timesteps: (n,) levels, ascending: what the network is told.
        noisiness: (n,) how far each level is from no noise, 0 to nearly 1; guidance falls with it.
        betas: (n,) noise added from each kept level to the next.
        alphas_cumprod: (n,) share of the signal's power at each level.
    """

    def __init__(self, steps: int, spacing: str = "even") -> None:
        """Choose the levels.

        Args:
            steps: how many, at least 2; the first and the last are always among them.
            spacing: "even", TorToiSe's respacing, or "quadratic", ever closer towards no noise.
        """
        if not 2 <= steps <= NUM_TIMESTEPS:
            raise ValueError(f"steps must be between 2 and {NUM_TIMESTEPS}, got {steps}")
        last = NUM_TIMESTEPS - 1
        if spacing == "even":
            levels = [round(i * last / (steps - 1)) for i in range(steps)]
            self.noisiness = [i / steps for i in range(steps)]
        elif spacing == "quadratic":
            levels = [0]
            for i in range(1, steps):
                levels.append(max(round(last * (i / (steps - 1)) ** 2), levels[-1] + 1))
            self.noisiness = [level / NUM_TIMESTEPS for level in levels]
        else:
            raise ValueError(f"spacing must be even or quadratic, got {spacing!r}")
        self.timesteps = torch.tensor(levels)
        every = torch.linspace(*BETAS, NUM_TIMESTEPS, dtype=torch.float64)
        self.alphas_cumprod = (1 - every).cumprod(0)[self.timesteps]
        self.alphas_cumprod_before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_before
        variance = self.betas * (1 - self.alphas_cumprod_before) / (1 - self.alphas_cumprod)
        variance[0] = variance[1]  # 0 has no logarithm
        self.log_variance_bounds = torch.stack([variance.log(), self.betas.log()])

    def __len__(self) -> int:
        return len(self.timesteps)


Network = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""A noisy mel and a step's index to the guided noise and the variance's place between its bounds."""


def guided_network(model: DiffusionDecoder, conditioning: torch.Tensor, schedule: Schedule, guidance: float) -> Network:
    """The network with TorToiSe's guidance, which ramps up from 0 at the noisiest level as the noise falls.

    Both branches go through the network as one batch of two.

    Args:
        model: the decoder.
        conditioning: (1, D, F) from `DiffusionDecoder.prepare`.
        schedule: which levels.
        guidance: its strength at the last step; 0 leaves the unconditioned branch out.
    """
    branches = torch.cat([conditioning, model.unconditioned(conditioning)]) if guidance else conditioning
    bins = model.config.num_mel_bins

    def predict(mel: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        timesteps = schedule.timesteps[index].to(mel.device).expand(len(branches))
        output = model(mel.expand(len(branches), -1, -1), timesteps, branches)
        noise, variance = output[:1].split(bins, dim=1)
        if guidance:
            strength = guidance * (1 - schedule.noisiness[index])
            noise = (1 + strength) * noise - strength * output[1:, :bins]
        return noise, variance

    return predict


def clean_mel(mel: torch.Tensor, noise: torch.Tensor, alpha_cumprod: float, clamp: bool = True) -> torch.Tensor:
    """The mel that is left when the predicted noise is taken out of a noisy one."""
    clean = mel / math.sqrt(alpha_cumprod) - noise * math.sqrt(1 / alpha_cumprod - 1)
    return clean.clamp(-1, 1) if clamp else clean


def ancestral_prediction(mel: torch.Tensor, index: int, network: Network, schedule: Schedule) -> Prediction:
    """Mean and variance of the next mel, TorToiSe's `p_mean_variance`."""
    noise, variance = network(mel, index)
    now, before = float(schedule.alphas_cumprod[index]), float(schedule.alphas_cumprod_before[index])
    beta = float(schedule.betas[index])
    clean = clean_mel(mel, noise, now)
    mean = clean * (beta * math.sqrt(before) / (1 - now)) + mel * ((1 - before) * math.sqrt(1 - beta) / (1 - now))
    low, high = (float(bound) for bound in schedule.log_variance_bounds[:, index])
    share = (variance + 1) / 2
    return Prediction(clean, mean, share * high + (1 - share) * low)


def ancestral(
    mel: torch.Tensor, network: Network, schedule: Schedule, noises: Iterator[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """TorToiSe's own loop: draw every next mel. Yields the mel after each step."""
    for index in reversed(range(len(schedule))):
        prediction = ancestral_prediction(mel, index, network, schedule)
        mel = prediction.mean
        if index:
            mel = mel + (0.5 * prediction.log_variance).exp() * next(noises)
        yield mel


def ddim(mel: torch.Tensor, network: Network, schedule: Schedule) -> Iterator[torch.Tensor]:
    """First-order deterministic steps (DDIM with eta 0). Yields the mel after each step."""
    for index in reversed(range(len(schedule))):
        now, before = float(schedule.alphas_cumprod[index]), float(schedule.alphas_cumprod_before[index])
        clean = clean_mel(mel, network(mel, index)[0], now)
        noise = (mel / math.sqrt(now) - clean) / math.sqrt(1 / now - 1)  # again, now that the clean mel is clamped
        mel = clean * math.sqrt(before) + noise * math.sqrt(1 - before)
        yield mel


def dpm_solver(mel: torch.Tensor, network: Network, schedule: Schedule, clamp: bool = True) -> Iterator[torch.Tensor]:
    """DPM-Solver++(2M): second-order deterministic steps that reuse the step before. Yields the mel after each step.

    Lu et al. 2022, algorithm 2, in terms of half the log of signal over noise. The network is asked at the very levels
    it was trained on. The step to the lowest level is of first order, because extrapolating over a step so much longer
    than the one before misleads; the last, to no noise at all, takes the clean mel as predicted. Levels should be
    spaced quadratically: on a mixture of two Gaussians with this schedule, 20 evenly spaced steps end 0.031 away from
    the exact answer (DDIM: 0.042), 20 quadratically spaced ones 0.007.

    Args:
        mel: (1, M, F) noise.
        network: from `guided_network`.
        schedule: which levels.
        clamp: keep the predicted clean mel in [-1, 1], as the other samplers do.
    """
    signal = schedule.alphas_cumprod.sqrt()
    noise_size = (1 - schedule.alphas_cumprod).sqrt()
    half_log_snr = (signal / noise_size).log()
    earlier, earlier_width = None, 0.0
    for index in reversed(range(len(schedule))):
        clean = clean_mel(mel, network(mel, index)[0], float(schedule.alphas_cumprod[index]), clamp)
        if index == 0:
            mel = clean
        else:
            width = float(half_log_snr[index - 1] - half_log_snr[index])
            towards = clean
            if earlier is not None and index > 1:
                share = width / earlier_width / 2
                towards = (1 + share) * clean - share * earlier
            ratio = float(noise_size[index - 1] / noise_size[index])
            mel = ratio * mel - float(signal[index - 1]) * math.expm1(-width) * towards
            earlier, earlier_width = clean, width
        yield mel


@torch.inference_mode()
def sample_mel(
    model: DiffusionDecoder,
    conditioning: torch.Tensor,
    settings: DiffusionSettings,
    generator: torch.Generator,
    progress: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Make a mel spectrogram.

    Args:
        model: the decoder.
        conditioning: (1, D, F) from `DiffusionDecoder.prepare`; its length is that of the mel.
        settings: sampler, steps and the rest.
        generator: draws all noise, on the CPU, so that a seed means the same on every device.
        progress: called after every step.

    Returns: (1, M, F) float32, normalised (`audio.denormalize_mel_24k` undoes that).
    Raises: ValueError: if the sampler isn't known or the number of steps is out of range.
    """
    schedule = Schedule(settings.steps, "quadratic" if settings.sampler == "dpm++2m" else "even")
    shape = (1, model.config.num_mel_bins, conditioning.shape[2])

    def noises() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randn(shape, generator=generator).to(conditioning.device)

    draws = noises()
    mel = next(draws) * settings.temperature
    network = guided_network(model, conditioning, schedule, settings.guidance)
    if settings.sampler == "ancestral":
        steps = ancestral(mel, network, schedule, draws)
    elif settings.sampler == "ddim":
        steps = ddim(mel, network, schedule)
    elif settings.sampler == "dpm++2m":
        steps = dpm_solver(mel, network, schedule)
    else:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {settings.sampler!r}")
    for step in steps:
        mel = step
        if progress is not None:
            progress()
    return mel
