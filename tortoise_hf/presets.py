"""How much work goes into speaking, by names people know from other programs of TorToiSe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tortoise_hf.errors import UserError
from tortoise_hf.generation import SamplingConfig
from tortoise_hf.samplers import SAMPLERS, DiffusionSettings


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much work goes into a piece of text."""

    num_samples: int
    """Rows of codes that are sampled; CLVP picks the one to be spoken."""
    diffusion: DiffusionSettings
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def _preset(num_samples: int, steps: int, sampler: str, guidance: float = 2.0) -> Preset:
    return Preset(num_samples=num_samples, diffusion=DiffusionSettings(sampler=sampler, steps=steps, guidance=guidance))


PRESETS = {
    "single_sample": _preset(8, 10, "dpm++2m"),
    "ultra_fast": _preset(16, 30, "ancestral", guidance=0.0),
    "very_fast": _preset(32, 30, "dpm++2m"),
    "fast": _preset(96, 20, "dpm++2m"),
    "standard": _preset(256, 200, "ancestral"),
    "high_quality": _preset(256, 400, "ancestral"),
}
"""Counts of samples and steps as in the programs people know: tortoise-tts's own (with its sampler) for ultra_fast,
standard and high_quality, tortoise-tts-fast's for single_sample, very_fast and fast."""


def choose_preset(
    name: str,
    *,
    num_samples: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    max_codes: int | None = None,
) -> Preset:
    """A preset, with some of its numbers replaced.

    Raises: UserError: if there is no such preset, or a number makes no sense.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    changes = {"steps": steps, "sampler": sampler}
    diffusion = replace(preset.diffusion, **{key: value for key, value in changes.items() if value is not None})
    changes = {"temperature": temperature, "max_codes": max_codes}
    sampling = replace(preset.sampling, **{key: value for key, value in changes.items() if value is not None})
    if diffusion.sampler not in SAMPLERS:
        raise UserError(f"There is no sampler {diffusion.sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    samples = preset.num_samples if num_samples is None else num_samples
    preset = replace(preset, num_samples=samples, diffusion=diffusion, sampling=sampling)
    for what, value, lowest in (
        ("the number of samples", preset.num_samples, 1),
        ("the number of diffusion steps", preset.diffusion.steps, 2),
        ("the temperature", preset.sampling.temperature, 0),
        ("the number of codes", preset.sampling.max_codes, 1),
    ):
        if value < lowest:
            raise UserError(f"{what[0].upper()}{what[1:]} must be at least {lowest}, got {value}.")
    return preset
