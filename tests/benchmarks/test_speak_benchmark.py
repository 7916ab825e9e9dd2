"""benchmarks/speak.py measures what it says."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import REPOSITORY


def test_every_stage_is_measured(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_speak", REPOSITORY / "benchmarks" / "speak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quick = ["--num_samples", "2", "--steps", "2", "--codes", "10", "--device", "cpu"]
    result = module.main([*quick, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    assert result["audio_seconds"] == pytest.approx(2 * 10 * 4 * 24_000 // 22_050 * 256 / 24_000 + 0.5, abs=0.05)
    stages = result["stage_seconds_per_audio_second"]
    assert all(seconds > 0 for seconds in stages.values())
    assert sum(stages.values()) <= result["real_time_factor"]
    assert 0 < result["first_sound_seconds"] < result["total_seconds"]
    assert result["peak_gib"]["process"] > 0.1
    # 8 layers of 12 x 128^2 weights and the head over 8,194 codes, 4 bytes each.
    assert result["floor"]["gib_of_weights_read_per_code"] == pytest.approx(
        4 * (8 * 12 * 128**2 + 8194 * 128) / 2**30, rel=0.02
    )
    assert result["floor"]["diffusion_tflop_per_audio_second"] > 0
