"""A plan of optimizer steps: complete, the same on any hardware, and with little padding."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tortoise_hf.data.sampler import Draw, StepSampler, count_positions


def speech_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Row lengths of clips that last as long as LJSpeech's: 1 to 10 s, 6.6 s on average."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(10 * rng.beta(2.6, 1.7, count) + 0.6, 1.1, 10.1)
    return count_positions(
        (seconds * rng.normal(8.5, 0.9, count)).astype(int) + 3, (seconds * 22_050).astype(int) // 1024 + 1
    )


def clips_of(micro_batches: list[list[Draw]]) -> list[int]:
    return [draw.index for micro_batch in micro_batches for draw in micro_batch if draw.weight]


def processes(count: int, **settings) -> list[StepSampler]:
    return [StepSampler(num_processes=count, process_index=index, **settings) for index in range(count)]


def test_a_row_is_conditioning_then_text_then_codes():
    # 5 ids: START 5 STOP STOP; 7 codes: START 7.
    assert count_positions([5], [7]).tolist() == [1 + 8 + 8]


@pytest.mark.parametrize("num_clips", [1, 2, 7, 8, 9, 40, 300])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_clip_comes_once_per_epoch(num_clips, num_processes):
    samplers = processes(num_processes, lengths=speech_lengths(num_clips), batch_size=8, micro_batch_size=3)
    for epoch in (0, 1):
        seen = [i for sampler in samplers for step in sampler.steps(epoch) for i in clips_of(step)]
        assert sorted(seen) == list(range(num_clips))


def test_all_steps_but_the_last_are_full():
    sampler = StepSampler(speech_lengths(300), batch_size=16, micro_batch_size=4)
    sizes = [len(clips_of(step)) for step in sampler.steps(0)]
    assert sizes == [16] * 18 + [12]
    assert sampler.steps_per_epoch == 19
    assert [sampler.step_size(step) for step in range(19)] == sizes


@pytest.mark.parametrize("num_clips", [1, 5, 90])
def test_processes_and_micro_batches_change_no_step(num_clips):
    lengths = speech_lengths(num_clips)
    expected = [set(step.tolist()) for step in StepSampler(lengths, 12, 12).global_steps(3)]
    for num_processes in (1, 2, 3):
        for micro_batch_size in (1, 2, 5, 64):
            samplers = processes(
                num_processes, lengths=lengths, batch_size=12, micro_batch_size=micro_batch_size, seed=0
            )
            shares = [sampler.steps(3) for sampler in samplers]
            found = [{i for share in step for i in clips_of(share)} for step in zip(*shares, strict=True)]
            assert found == expected


@pytest.mark.parametrize("num_clips", [1, 2, 3, 17, 50])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_processes_get_as_many_micro_batches_as_each_other(num_clips, micro_batch_size):
    samplers = processes(3, lengths=speech_lengths(num_clips), batch_size=9, micro_batch_size=micro_batch_size)
    plans = [sampler.steps(0) for sampler in samplers]
    for step in range(samplers[0].steps_per_epoch):
        expected = samplers[0].num_micro_batches(step)
        assert [len(plan[step]) for plan in plans] == [expected] * 3
        assert all(1 <= len(micro_batch) <= micro_batch_size for plan in plans for micro_batch in plan[step])


def test_a_process_without_a_clip_gets_one_that_counts_for_nothing():
    first, second = processes(2, lengths=[30], batch_size=4, micro_batch_size=4)
    assert first.steps(5) == [[[Draw(0, 5, 1)]]]
    assert second.steps(5) == [[[Draw(0, 5, 0)]]]


def test_two_clips_on_two_processes_are_one_each():
    shares = [clips_of(s.steps(0)[0]) for s in processes(2, lengths=[30, 31], batch_size=8, micro_batch_size=4)]
    assert sorted(shares) == [[0], [1]]


def test_epochs_and_seeds_differ_and_runs_repeat():
    lengths = speech_lengths(64)
    plan = StepSampler(lengths, 8, 4, seed=1).steps(0)
    assert plan == StepSampler(lengths, 8, 4, seed=1).steps(0)
    assert plan != StepSampler(lengths, 8, 4, seed=2).steps(0)
    orders = [[clips_of(step) for step in StepSampler(lengths, 8, 4, seed=1).steps(epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_a_small_dataset_forms_other_steps_in_every_epoch():
    sampler = StepSampler(speech_lengths(64), batch_size=8, micro_batch_size=8)
    first, second = ({frozenset(step.tolist()) for step in sampler.global_steps(epoch)} for epoch in (0, 1))
    assert len(first & second) <= 2


def test_resuming_gives_the_rest_of_the_run():
    sampler = StepSampler(speech_lengths(50), batch_size=8, micro_batch_size=3, num_processes=2)
    unbroken = list(islice(sampler.iterate(), 60))
    done = sum(sampler.num_micro_batches(step) for step in range(sampler.steps_per_epoch))  # epoch 0
    done += sampler.num_micro_batches(0) + sampler.num_micro_batches(1)
    assert list(islice(sampler.iterate(1, 2), 60 - done)) == unbroken[done:]
    assert next(sampler.iterate(0, sampler.steps_per_epoch)) == next(sampler.iterate(1))


def test_a_batch_larger_than_the_dataset_is_one_step_in_micro_batches():
    (step,) = StepSampler(speech_lengths(10), batch_size=128, micro_batch_size=4).steps(0)
    assert sorted(len(micro_batch) for micro_batch in step) == [3, 3, 4]


def test_padding_is_small():
    lengths = speech_lengths(3000)
    assert StepSampler(lengths, 128, 8).padding_share(0) < 0.025
    assert StepSampler(lengths, 8, 8).padding_share(0) < 0.06
    assert StepSampler(lengths, 128, 8, num_processes=4).padding_share(0) < 0.025


def test_padding_share_counts_what_the_micro_batches_pad():
    samplers = processes(2, lengths=speech_lengths(23), batch_size=8, micro_batch_size=3)
    rows = [
        (micro_batch, samplers[0].lengths[[draw.index for draw in micro_batch]])
        for sampler in samplers
        for step in sampler.steps(0)
        for micro_batch in step
    ]
    used = sum(length for draws, lengths in rows for draw, length in zip(draws, lengths, strict=True) if draw.weight)
    total = sum(lengths.max() * len(lengths) for _, lengths in rows)
    assert samplers[0].padding_share(0) == pytest.approx(1 - used / total)


def test_processes_work_on_equally_long_rows_at_the_same_time():
    samplers = processes(2, lengths=speech_lengths(256), batch_size=64, micro_batch_size=4)
    positions = [
        [sum(samplers[0].lengths[[d.index for d in b]].max() * len(b) for b in step) for step in sampler.steps(0)]
        for sampler in samplers
    ]
    np.testing.assert_allclose(positions[0], positions[1], rtol=0.05)


def test_groups_are_neighbours_and_the_same_on_any_hardware():
    lengths = speech_lengths(50)

    def groups_of(num_processes, micro_batch_size):
        samplers = processes(
            num_processes, lengths=lengths, batch_size=20, micro_batch_size=micro_batch_size, conditioning_group=4
        )
        draws = [draw for sampler in samplers for step in sampler.steps(1) for one in step for draw in one]
        return {draw.index: draw.group for draw in draws if draw.weight}

    expected = groups_of(1, 8)
    assert groups_of(2, 5) == groups_of(3, 1) == expected
    assert sorted(len(group) for group in set(expected.values())) == [2] + [4] * 12
    for index, group in expected.items():
        assert index in group
        assert list(lengths[list(group)]) == sorted(lengths[list(group)], reverse=True)
    assert all(draw.group == () for one in StepSampler(lengths, 20, 8).steps(0)[0] for draw in one)
