"""Padding, targets and masks of a batch."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from tortoise_hf.data.collate import IGNORE_INDEX, Collator, Example
from tortoise_hf.errors import UserError

START_TEXT, STOP_TEXT, START_MEL, STOP_MEL = 255, 0, 8192, 8193


def collator(padding: str = "mask", max_text_ids: int = 402, max_mel_codes: int = 604) -> Collator:
    return Collator(
        start_text_id=START_TEXT,
        stop_text_id=STOP_TEXT,
        start_mel_id=START_MEL,
        stop_mel_id=STOP_MEL,
        max_text_ids=max_text_ids,
        max_mel_codes=max_mel_codes,
        padding=padding,
    )


def example(num_text_ids: int, num_codes: int, index: int = 0, weight: int = 1) -> Example:
    rng = np.random.default_rng(index)
    return Example(
        text_ids=rng.integers(2, 255, num_text_ids).astype(np.int16),
        mel_codes=rng.integers(0, 8192, num_codes).astype(np.int16),
        conditioning_mel=np.full((2, 80, 5), index, dtype=np.float32),
        index=index,
        weight=weight,
    )


def test_a_row_by_hand():
    clip = example(2, 3)
    clip.text_ids, clip.mel_codes = np.array([7, 8]), np.array([50, 51, 52])
    batch = collator()([clip])
    assert batch.text_inputs.tolist() == [[START_TEXT, 7, 8, STOP_TEXT, STOP_TEXT]]
    assert batch.text_targets.tolist() == [[7, 8, STOP_TEXT, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.mel_inputs.tolist() == [[START_MEL, 50, 51, 52]]
    assert batch.mel_targets.tolist() == [[50, 51, 52, STOP_MEL]]
    assert batch.text_lengths.tolist() == [5]
    assert batch.mel_lengths.tolist() == [4]
    assert (batch.num_text_targets, batch.num_mel_targets) == (3, 4)


def test_cut_by_length_gives_the_clips_back():
    clips = [example(9, 30, 0), example(14, 21, 1), example(3, 44, 2)]
    batch = collator()(clips)
    for row, clip in enumerate(clips):
        text_length, mel_length = int(batch.text_lengths[row]), int(batch.mel_lengths[row])
        assert batch.text_inputs[row, 1 : text_length - 2].tolist() == clip.text_ids.tolist()
        assert batch.mel_inputs[row, 1:mel_length].tolist() == clip.mel_codes.tolist()
        assert batch.text_targets[row, : text_length - 2].tolist() == [*clip.text_ids, STOP_TEXT]
        assert batch.mel_targets[row, :mel_length].tolist() == [*clip.mel_codes, STOP_MEL]
        assert (batch.text_targets[row, text_length - 2 :] == IGNORE_INDEX).all()
        assert (batch.mel_targets[row, mel_length:] == IGNORE_INDEX).all()
    assert batch.num_text_targets == sum(len(clip.text_ids) + 1 for clip in clips)
    assert batch.num_mel_targets == sum(len(clip.mel_codes) + 1 for clip in clips)
    assert batch.indices.tolist() == [0, 1, 2]
    assert batch.conditioning_mel[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_neighbours_change_nothing_but_the_width():
    clip = example(9, 30)
    alone, together = collator()([clip]), collator()([clip, example(40, 100, 1)])
    text, mel = alone.text_inputs.shape[1], alone.mel_inputs.shape[1]
    assert together.text_inputs[0, :text].tolist() == alone.text_inputs[0].tolist()
    assert together.mel_targets[0, :mel].tolist() == alone.mel_targets[0].tolist()
    assert together.text_lengths[0] == alone.text_lengths[0]


@pytest.mark.parametrize("padding", ["mask", "stop"])
def test_padding_is_made_of_ids_the_embeddings_know(padding):
    batch = collator(padding)([example(2, 3, 0), example(9, 30, 1)])
    assert batch.text_inputs.min() >= 0
    assert batch.mel_inputs.min() >= 0


@pytest.mark.parametrize("padding", ["mask", "stop"])
def test_a_filler_row_has_no_targets(padding):
    batch = collator(padding)([example(9, 30, weight=0)])
    assert (batch.num_text_targets, batch.num_mel_targets) == (0, 0)
    assert (batch.text_targets == IGNORE_INDEX).all()
    assert (batch.mel_targets == IGNORE_INDEX).all()


def test_padding_with_stop_is_the_reference_trainers():
    golden = load_file(GOLDEN / "gpt.safetensors")
    clips = [
        Example(
            text_ids=golden["in.text"][row, : golden["in.text_lengths"][row]].numpy(),
            mel_codes=golden["in.mel_codes"][row, : golden["in.wav_lengths"][row] // 1024 + 1].numpy(),
            conditioning_mel=golden["in.cond_mels"][row].numpy(),
            index=row,
        )
        for row in range(2)
    ]
    config = SimpleNamespace(
        start_text_id=255, stop_text_id=0, start_mel_id=256, stop_mel_id=257, max_text_tokens=40, max_mel_tokens=60
    )
    batch = Collator.for_model(config, padding="stop")(clips)
    assert batch.text_targets.tolist() == golden["out.ref.text_targets"].tolist()
    assert batch.mel_targets.tolist() == golden["out.ref.mel_targets"].tolist()
    assert batch.text_inputs.tolist() == [[255, *row[:-1]] for row in golden["out.ref.text_targets"].tolist()]
    assert batch.mel_inputs.tolist() == [[256, *row[:-1]] for row in golden["out.ref.mel_targets"].tolist()]
    assert torch.equal(batch.conditioning_mel, golden["in.cond_mels"])
    assert batch.text_lengths.tolist() == [14, 14], "what is filled in counts as well"
    assert batch.mel_lengths.tolist() == [22, 22]
    assert (batch.num_text_targets, batch.num_mel_targets) == (2 * 14, 2 * 22)


def test_the_models_walls():
    walls = {"max_text_ids": 40, "max_mel_codes": 60}
    # As many ids as the model takes leave room for START and one STOP in its 42 positions.
    full = collator(**walls)([example(40, 60)])
    assert full.text_inputs.shape[1] == full.text_lengths[0] == 42
    assert full.text_targets[0, 40] == STOP_TEXT
    with pytest.raises(UserError, match=r"41 text ids.*40.*data\.max_text_ids"):
        collator(**walls)([example(41, 60)])
    with pytest.raises(UserError, match=r"61 mel codes.*60.*data\.max_samples"):
        collator(**walls)([example(40, 61)])


def test_a_batch_moves_as_a_whole_and_feeds_the_model():
    batch = collator()([example(9, 30), example(4, 5, 1)])
    moved = batch.to("meta")
    assert moved.text_targets.device.type == moved.conditioning_mel.device.type == "meta"
    assert moved.num_mel_targets == batch.num_mel_targets
    assert moved.packing.order.device.type == moved.packing.boundaries.device.type == "meta"
    assert moved.packing.row_lengths == batch.packing.row_lengths == (1 + (9 + 3) + (30 + 1), 1 + (4 + 3) + (5 + 1))
    names = {"text_inputs", "mel_inputs", "conditioning_mel", "conditioning_rows"}
    assert set(batch.model_inputs()) == names | {"packing", "text_targets", "mel_targets"}


def test_a_collator_travels_to_worker_processes():
    assert pickle.loads(pickle.dumps(collator("stop"))) == collator("stop")
