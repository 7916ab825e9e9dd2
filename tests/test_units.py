import pytest

from tortoise_hf.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (42, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_times(seconds, words):
    assert format_seconds(seconds) == words


@pytest.mark.parametrize(("count", "words"), [(0, "0 MiB"), (310 * 2**20, "310 MiB"), (5.1 * 2**30, "5.1 GiB")])
def test_sizes(count, words):
    assert format_bytes(count) == words
