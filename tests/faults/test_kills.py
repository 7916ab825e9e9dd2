from faults.kills import survive


def test_kills_at_random_moments_and_inside_saves(tiny_base, tiny_voice, tmp_path):
    """A few here; docs/reliability.md has the figures of `python tests/faults/kills.py`, which kills more often."""
    counts = survive(tiny_base, tiny_voice(10), tmp_path, kills=6, seed=1)
    assert min(counts.values()) > 0, counts
