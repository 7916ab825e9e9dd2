"""Draws of conditioning clips: other clips of the same speaker, repeatable, cut or padded as when the voice speaks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader
from voice_maker import MEL_NORMS, load_dvae, waveform

from tortoise_hf.audio import LogMel
from tortoise_hf.data.collate import Collator, ExampleDataset
from tortoise_hf.data.conditioning import ConditioningDraws
from tortoise_hf.data.examples import ClipEncoder
from tortoise_hf.data.sampler import Draw

FEATURES = Features(
    {
        "clip_id": Value("string"),
        "speaker": Value("string"),
        "num_samples": Value("int32"),
        "mel": List(Value("float16")),
        "mel_cuts": List(Value("float16")),
        "text_ids": List(Value("int16")),
        "mel_codes": List(Value("int16")),
    }
)


def make_examples(speakers: str, first: int = 0, num_frames: int = 40) -> Dataset:
    """Clips 0, 1, ... of the speakers named by letters; every mel value of clip n is n."""
    count = len(speakers)
    return Dataset.from_dict(
        {
            "clip_id": [f"clip-{first + number}" for number in range(count)],
            "speaker": list(speakers),
            "num_samples": [num_frames * 256 - 1] * count,
            "mel": [np.full(num_frames * 80, first + number, np.float16) for number in range(count)],
            "mel_cuts": [np.full(num_frames // 8 * 160, first + number, np.float16) for number in range(count)],
            "text_ids": [[5, 6, 7][: 1 + number % 3] for number in range(count)],
            "mel_codes": [list(range(num_frames // 4))] * count,
        },
        features=FEATURES,
    )


def encoded_examples(*lengths: int) -> Dataset:
    """Real clips of so many samples, one speaker."""
    encoder = ClipEncoder(load_dvae, MEL_NORMS, 1, 10**6)
    clips = [encoder.encode(torch.from_numpy(waveform(length, seed=length))) for length in lengths]
    examples = make_examples("a" * len(lengths)).remove_columns(["num_samples", "mel", "mel_cuts"])
    examples = examples.add_column("num_samples", list(lengths))
    examples = examples.add_column("mel", [clip.mel.reshape(-1) for clip in clips])
    return examples.add_column("mel_cuts", [clip.mel_cuts.reshape(-1) for clip in clips])


def drawn_clips(draws: ConditioningDraws, index: int, epochs: int = 30) -> list[set[int]]:
    """Clips drawn for one row in each of some epochs, by the value their mels are filled with."""
    return [set(draws(Draw(index, epoch, 1))[:, :, 0].flatten().astype(int).tolist()) for epoch in range(epochs)]


def test_other_clips_of_the_same_speaker():
    draws = ConditioningDraws(make_examples("aabbaab"), MEL_NORMS)
    for index, others in ((0, {1, 4, 5}), (4, {0, 1, 5}), (2, {3, 6})):
        drawn = drawn_clips(draws, index)
        assert set.union(*drawn) == others
        assert all(len(clips) == 2 for clips in drawn)


def test_the_clip_itself_only_if_its_speaker_has_no_other():
    draws = ConditioningDraws(make_examples("abbc"), MEL_NORMS)
    assert set.union(*drawn_clips(draws, 0)) == {0}
    assert set.union(*drawn_clips(draws, 1)) == {2}


def test_evaluation_clips_also_hear_the_training_clips():
    draws = ConditioningDraws(make_examples("abc"), MEL_NORMS, pool=make_examples("aab", first=3))
    assert set.union(*drawn_clips(draws, 0)) == {3, 4}
    assert set.union(*drawn_clips(draws, 1)) == {5}
    assert set.union(*drawn_clips(draws, 2)) == {2}


def test_a_pool_with_the_clip_in_it_does_not_give_it_away():
    draws = ConditioningDraws(make_examples("a"), MEL_NORMS, pool=make_examples("aaa"))
    assert set.union(*drawn_clips(draws, 0)) == {1, 2}


def test_runs_repeat_and_epochs_differ():
    examples = make_examples("a" * 30)
    first, second = ConditioningDraws(examples, MEL_NORMS, seed=7), ConditioningDraws(examples, MEL_NORMS, seed=7)
    assert drawn_clips(first, 3) == drawn_clips(second, 3)
    assert drawn_clips(first, 3) != drawn_clips(ConditioningDraws(examples, MEL_NORMS, seed=8), 3)
    assert len({frozenset(clips) for clips in drawn_clips(first, 3)}) > 5


@pytest.mark.parametrize("num_samples", [13_230, 44_000, 100_001, 131_700])
def test_a_short_clip_is_what_the_front_end_makes_of_it_with_zeros_behind(num_samples):
    draws = ConditioningDraws(encoded_examples(num_samples), MEL_NORMS)
    (window, _) = torch.from_numpy(draws(Draw(0, 0, 1)))
    samples = torch.from_numpy(waveform(num_samples, seed=num_samples))
    expected = LogMel(MEL_NORMS)(torch.nn.functional.pad(samples, (0, 132_300 - num_samples)))[0]
    assert window.shape == expected.shape == (80, 517)
    torch.testing.assert_close(window, expected, atol=1e-3, rtol=1e-3)


def test_a_part_of_a_long_clip_is_what_the_front_end_makes_of_that_part():
    """From its first frame on, which hears the beginning of the part mirrored: there the encoder answers."""
    draws = ConditioningDraws(encoded_examples(170_000), MEL_NORMS)
    samples = torch.from_numpy(waveform(170_000, seed=170_000))
    log_mel = LogMel(MEL_NORMS)
    parts = torch.cat([log_mel(samples[start : start + 132_300]) for start in range(0, 170_000 - 132_300, 2048)])
    starts = set()
    for epoch in range(40):
        for window in torch.from_numpy(draws(Draw(0, epoch, 1))):
            errors = (parts - window).abs()[:, :, :-2].amax((1, 2))
            starts.add(int(errors.argmin()))
            assert errors.min() < 5e-3
    assert starts == set(range(len(parts)))


def test_window_length_and_number_follow_the_settings():
    draws = ConditioningDraws(encoded_examples(150_000, 20_000), MEL_NORMS, num_clips=3, seconds=2.0)
    assert draws(Draw(0, 0, 1)).shape == (3, 80, 44_100 // 256 + 1)


def test_loader_processes_change_nothing():
    dataset = ExampleDataset(make_examples("aaab"), ConditioningDraws(make_examples("aaab"), MEL_NORMS))
    collate = Collator(255, 0, 256, 257, max_text_ids=40, max_mel_codes=60)
    plan = [[Draw(0, 0, 1), Draw(3, 0, 1)], [Draw(2, 0, 0)], [Draw(1, 1, 1), Draw(2, 1, 1)]]
    alone = list(DataLoader(dataset, batch_sampler=plan, collate_fn=collate))
    # Pickled, as it is where processes aren't forked.
    dataset = pickle.loads(pickle.dumps(dataset))
    together = list(DataLoader(dataset, batch_sampler=plan, collate_fn=collate, num_workers=2))
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.conditioning_mel, other.conditioning_mel)
        assert torch.equal(one.text_inputs, other.text_inputs)
        assert torch.equal(one.mel_targets, other.mel_targets)
        assert (one.num_mel_targets, one.indices.tolist()) == (other.num_mel_targets, other.indices.tolist())


def test_a_group_hears_the_same_clips_and_none_of_its_own():
    draws = ConditioningDraws(make_examples("a" * 10 + "b" * 6), MEL_NORMS)
    group = (0, 3, 7, 12, 13)
    for epoch in range(20):
        heard = {row: draws(Draw(row, epoch, 1, group)) for row in group}
        for speaker, mates in (({0, 3, 7}, set(range(10))), ({12, 13}, set(range(10, 16)))):
            first, *others = (heard[row] for row in sorted(speaker))
            assert all(np.array_equal(first, other) for other in others)
            clips = set(first[:, :, 0].flatten().astype(int).tolist())
            assert len(clips) == 2
            assert clips < mates - speaker


def test_a_group_that_leaves_too_few_clips_shares_nothing():
    draws = ConditioningDraws(make_examples("aaaa"), MEL_NORMS)
    group = (0, 1, 2)
    assert draws.sharing(Draw(1, 0, 1, group)) == [1]
    assert np.array_equal(draws(Draw(1, 4, 1, group)), draws(Draw(1, 4, 1)))
    assert set.union(*({*draws.choose(Draw(1, e, 1, group))[0].tolist()} for e in range(30))) == {0, 2, 3}


def test_what_a_group_hears_is_loaded_once():
    examples = make_examples("a" * 8 + "b")
    dataset = ExampleDataset(examples, ConditioningDraws(examples, MEL_NORMS))
    group = (0, 1, 2, 8)
    fetched = dataset.__getitems__([Draw(row, 0, 1, group) for row in (0, 1, 8)] + [Draw(5, 0, 1), Draw(5, 0, 1)])
    assert [example.conditioning_of for example in fetched] == [0, 0, 8, None, None]
    assert fetched[0].conditioning_mel is fetched[1].conditioning_mel
    batch = Collator(255, 0, 256, 257, max_text_ids=40, max_mel_codes=60)(fetched)
    assert batch.conditioning_rows.tolist() == [0, 0, 1, 2, 3]
    for row, draw in enumerate([Draw(0, 0, 1, group), Draw(1, 0, 1, group)]):
        mel = batch.conditioning_mel[batch.conditioning_rows[row]]
        assert np.array_equal(mel, dataset[draw].conditioning_mel)
