"""benchmarks/speak.py measures what it says."""

from __future__ import annotations

import importlib
import json

import pytest
from conftest import REPOSITORY


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as it is run: with its own folder in front of the search path."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


def test_every_stage_is_measured(benchmark, tmp_path):
    quick = ["--num_samples", "2", "--steps", "2", "--codes", "10", "--device", "cpu", "--low_memory"]
    result = benchmark("speak").main([*quick, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    assert result["audio_seconds"] == pytest.approx(2 * 10 * 4 * 24_000 // 22_050 * 256 / 24_000 + 0.5, abs=0.05)
    stages = result["stage_seconds_per_audio_second"]
    assert all(seconds > 0 for seconds in stages.values())
    assert sum(stages.values()) <= result["real_time_factor"]
    assert 0 < result["first_sound_seconds"] < result["total_seconds"]
    assert result["peak_gib"]["process"] > 0.1
    floor = result["floor"]
    # 6 layers of 12 x 192^2 weights and the head over 8,194 codes, 4 bytes each.
    assert floor["bytes_of_weights_read_per_code"] == pytest.approx(4 * (6 * 12 * 192**2 + 8194 * 192), rel=0.02)
    assert floor["diffusion_operations_per_audio_second"] > 1e8
    for name, share in result["share_of_the_floor"].items():
        assert share == pytest.approx(floor[f"{name}_seconds"] / (stages[name] * result["audio_seconds"]))
        assert share < 1
