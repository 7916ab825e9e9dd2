"""What claims.py trains on and compares with, and mistakes it tells before it trains."""

import pytest


@pytest.mark.parametrize("own_clip", [False, True])
def test_the_lists_are_fixed_and_share_no_clip(benchmark, tmp_path, own_clip):
    claims = benchmark("claims")
    folder = claims.write_recordings(tmp_path / "recordings", own_clip)
    train, held_out = ((folder / name).read_text().splitlines()[1:] for name in ("train.txt", "val.txt"))
    assert (len(train), len(held_out)) == (263, 37)
    rows = [line.split("|") for line in [*train, *held_out]]
    assert len({path for path, _, _ in rows}) == 300
    assert all((folder / path).is_file() and text for path, text, _ in rows)
    assert len({speaker for _, _, speaker in rows}) == (300 if own_clip else 1)


def test_compared_speakers_are_of_all_kinds_alike(benchmark, tmp_path):
    claims = benchmark("claims")
    corpus = tmp_path / "corpus"
    (corpus / "wavs").mkdir(parents=True)
    speakers = [
        f"{kind}-{number}" for kind, count in (("man", 30), ("woman", 12), ("child", 2)) for number in range(count)
    ]
    lines = ["audio_file|text|speaker"]
    for clip, speaker in enumerate(speakers * 2):
        (corpus / "wavs" / f"{clip}.flac").write_bytes(b"sound")
        lines.append(f"wavs/{clip}.flac|Hello.|{speaker}")
    (corpus / "metadata.csv").write_text("\n".join(lines) + "\n")
    folder = claims.write_voices(corpus, tmp_path / "voices")
    kept = [line.split("|") for line in (folder / "metadata.csv").read_text().splitlines()[1:]]
    chosen = {speaker for _, _, speaker in kept}
    assert len(chosen) == claims.NUM_VOICES
    assert {kind: sum(speaker.startswith(kind) for speaker in chosen) for kind in ("man", "woman", "child")} == {
        "man": 7, "woman": 7, "child": 2,
    }  # fmt: skip
    assert len(kept) == 2 * claims.NUM_VOICES
    assert all((folder / path).read_bytes() == b"sound" for path, _, _ in kept)


def test_a_missing_corpus_is_told_before_anything_is_trained(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark("claims").main(["--output", str(tmp_path / "claims"), "--voices", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert "holds no metadata.csv; make base makes the corpus" in capsys.readouterr().err
    assert not (tmp_path / "claims").exists()
