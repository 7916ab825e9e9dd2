"""Pieces of clips have the codes that preparation gives the whole clip, and shares of a batch make up the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from voice_maker import MEL_NORMS, config, load_dvae, make_voice, write_clip, write_list

from tortoise_hf.audio import LogMel, load_waveform
from tortoise_hf.data.examples import ClipEncoder
from tortoise_hf.data.mels import SILENCE, ClipMels, PieceDraws, measure_mel_norms, prepare_mels
from tortoise_hf.dvae_training import Reconstruction
from tortoise_hf.errors import UserError

SECONDS = [0.7, 1.9, 3.2, 5.3, 0.9, 2.4]


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    return make_voice(tmp_path_factory.mktemp("mels") / "voice", SECONDS)


@pytest.fixture(scope="module")
def mels(voice) -> ClipMels:
    return prepare_mels(config(voice, eval_fraction=0), show_progress=False).train


def whole_clip_codes(mels: ClipMels, index: int) -> np.ndarray:
    return ClipEncoder(load_dvae, MEL_NORMS, 1, 1 << 20).encode(load_waveform(mels.paths[index])).mel_codes


def test_log_mels_are_those_of_the_clip_and_the_rest_is_silence(mels):
    assert mels.clip_ids == [f"clip-{number:03}" for number in range(len(SECONDS))]
    samples = load_waveform(mels.paths[2])
    expected = LogMel()(torch.nn.functional.pad(samples, (0, 8192)))[0]
    count = int(mels.num_codes[2])
    torch.testing.assert_close(mels.cut(2, 0, count + 4), expected[:, : 4 * (count + 4)], atol=1e-2, rtol=0)
    assert (mels.cut(2, count + 1, 3) == np.float32(SILENCE)).all()


@pytest.mark.parametrize("piece_codes", [5, 30])
def test_codes_of_a_piece_are_the_whole_clips(mels, piece_codes):
    dvae = load_dvae()
    draw = PieceDraws(mels, 24, piece_codes, dvae.config.reach, seed=1)
    model = Reconstruction(dvae, MEL_NORMS)
    known = [whole_clip_codes(mels, index) for index in range(len(mels))]
    same = total = 0
    begins = ends = inside = 0
    for number in range(3):
        pieces = draw(number)
        with torch.no_grad():
            codes = dvae.codebook.nearest(model.encode(pieces))
        target = pieces.target()
        rng = np.random.default_rng([1, number])
        clips = rng.choice(len(mels), 24, p=mels.num_codes / mels.num_codes.sum())
        for row, clip in enumerate(clips):
            valid = int(pieces.valid[row].sum())
            starts = [
                start
                for start in range(len(known[clip]) - valid + 1)
                if torch.equal(mels.cut(int(clip), start, piece_codes), target[row])
            ]
            assert len(starts) == 1, "the target is one place of the clip"
            expected = known[clip][starts[0] : starts[0] + valid]
            same += int((codes[row, :valid].numpy() == expected).sum())
            total += valid
            begins += starts[0] == 0
            ends += starts[0] + valid == len(known[clip])
            inside += dvae.config.reach < starts[0]
    # Log-mels are stored in 16 bits, which may tip a vector half-way between two codes.
    assert same >= 0.99 * total
    assert min(begins, ends) >= 5
    assert inside >= 5


def test_shares_of_processes_make_up_the_batch(mels):
    draw = PieceDraws(mels, 7, 20, 8, seed=3)
    whole, shares = draw(4), [draw(4, rank, 2) for rank in range(2)]
    assert [len(share.first) for share in shares] == [4, 3]
    for rank, share in enumerate(shares):
        assert torch.equal(share.log_mel, whole.log_mel[rank::2])
        assert torch.equal(share.first, whole.first[rank::2])
        assert share.num_valid == whole.num_valid == int(whole.valid.sum())
    assert not torch.equal(draw(5).log_mel, whole.log_mel)


def test_every_moment_is_as_likely_as_the_others():
    class Clips:
        num_codes = np.array([3, 40, 90])

        def cut(self, index, first_code, count):
            codes = torch.arange(first_code, first_code + count).repeat_interleave(4)
            return (1000.0 * index + codes).expand(80, -1)

    draw = PieceDraws(Clips(), 64, 10, 4, seed=0)
    counts = np.zeros((3, 90))
    for number in range(100):
        pieces = draw(number)
        heard = pieces.target()[:, 0, ::4][pieces.valid].int().numpy()
        np.add.at(counts, (heard // 1000, heard % 1000), 1)
    for clip, length in enumerate(Clips.num_codes):
        assert (counts[clip, length:] == 0).all()
        # Pieces moved to an end make the ten codes there up to twice as frequent as those in the middle.
        assert counts[clip, :length].min() > 0.4 * counts[clip, :length].max()


def test_norms_are_the_mean_of_each_bin_and_at_most_minus_two():
    first, second = torch.full((80, 3), -8.0), torch.full((80, 1), -4.0)
    first[7] = second[7] = 1.0
    norms = measure_mel_norms([first, second])
    assert norms[0] == -7.0
    assert norms[7] == -2.0


def test_split_and_report_are_those_of_preparation(voice):
    from voice_maker import prepare

    settings = {"min_seconds": 0.8, "eval_fraction": 0.3, "min_eval_clips": 1}
    found = prepare_mels(config(voice, **settings), show_progress=False)
    expected = prepare(voice, **settings)
    assert found.train.clip_ids == expected.train["clip_id"]
    assert found.eval.clip_ids == expected.eval["clip_id"]
    assert [row.clip_id for row in found.report.dropped["too_short"]] == ["clip-000"]
    assert (found.report.kept, found.report.num_eval) == (expected.report.kept, expected.report.num_eval)


def test_no_usable_clip_is_an_error(tmp_path):
    write_clip(tmp_path / "voice" / "wavs" / "a.wav", 0.2)
    write_list(tmp_path / "voice" / "metadata.csv", [("a", "Hello."), ("b", "Gone.")])
    with pytest.raises(UserError, match="none of the 2 clips can be used"):
        prepare_mels(config(tmp_path / "voice"), show_progress=False)
