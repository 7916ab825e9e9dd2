"""benchmarks/speak.py measures what it says."""

from __future__ import annotations

import json

import pytest


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


def test_previews_are_timed_together_and_apart(benchmark):
    quick = ["--texts", "3", "--codes", "5", "--batch_sizes", "1", "3", "--repeats", "1", "--device", "cpu"]
    result = benchmark("previews").main(quick)
    assert set(result["seconds"]) == {1, 3}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert 5 < result["million_weights"] < 8
    texts = benchmark("previews").spread("one two three four five six seven eight nine ten", 20)
    assert len(texts) == 20
    assert len({len(text) for text in texts}) > 5


def test_table_of_the_comparison(benchmark):
    """Medians, and ratios of computing time."""

    def runs(*seconds):
        return [
            {
                "loading": {"seconds": 2.0, "cpu_seconds": 1.0},
                "speaking": {"seconds": 2 * each, "cpu_seconds": each},
                "peak_gib": 3.0,
            }
            for each in seconds
        ]

    comparison = benchmark("speak_beside_peer")
    medians = comparison.summarize({"ours": runs(4.0, 1.0, 2.0), "tortoise-tts": runs(9.0, 6.0, 3.0)})
    assert medians["ours"] == {"seconds": 4.0, "cpu_seconds": 2.0, "loading_cpu_seconds": 1.0, "peak_gib": 3.0}
    assert comparison.table(medians).splitlines()[-1] == "| tortoise-tts | 12.0 | 6.0 | 3.00 | 1.0 | 3.00 |"
