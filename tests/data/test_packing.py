"""Where the positions of packed rows are."""

from __future__ import annotations

import pickle

import pytest
import torch

from tortoise_hf.data.packing import IGNORE_INDEX, pack

X = IGNORE_INDEX


def packed(text_lengths=(2, 1), mel_lengths=(1, 3), text_targets=((5, X), (6, X)), mel_targets=((7, X, X), (8, X, 9))):
    tensors = (text_lengths, mel_lengths, text_targets, mel_targets)
    return pack(*(torch.tensor(one) for one in tensors))


def test_by_hand():
    """Rows c a b x and d e u v w: the first has two text positions and one mel position, the second one and three."""
    packing = packed()
    assert packing.row_lengths == (4, 5)
    assert packing.num_positions == 9
    assert packing.boundaries.tolist() == [0, 4, 9]
    text_ids, mel_ids = torch.tensor([list(map(ord, row)) for row in ("ab", "e-")]), torch.tensor(
        [list(map(ord, row)) for row in ("x--", "uvw")]
    )  # fmt: skip
    pieces = [torch.tensor([ord("c"), ord("d")]), text_ids.flatten()[packing.text], mel_ids.flatten()[packing.mel]]
    assert "".join(map(chr, torch.cat(pieces)[packing.order])) == "cabxdeuvw"
    positions = [(packing.text % 2).tolist(), (packing.mel % 3).tolist()]
    assert positions == [[0, 1, 0], [0, 0, 1, 2]], "each row counts from 0"


def test_targets_that_count_and_who_is_asked():
    packing = packed()
    assert packing.text_targets.tolist() == [0, 2]
    assert packing.text_askers.tolist() == [1, 5], "a and e"
    assert packing.mel_targets.tolist() == [0, 3, 5]
    assert packing.mel_askers.tolist() == [3, 6, 8], "x, u and w"


def test_padded_rows_and_back():
    packing = packed()
    rows = torch.arange(9)[packing.spread].view(2, 5)
    assert rows[0, :4].tolist() == [0, 1, 2, 3]
    assert rows[1].tolist() == [4, 5, 6, 7, 8]
    assert rows.flatten()[packing.gathered].tolist() == list(range(9))


def test_neighbours_of_one_length_are_a_run():
    ones = torch.ones(5, dtype=torch.long)
    nothing = torch.full((5, 4), X)
    packing = pack(ones, torch.tensor([2, 2, 3, 2, 2]), nothing, nothing)
    assert packing.runs == [(4, 2), (5, 1), (4, 2)]
    assert packing.text_targets.numel() == packing.mel_askers.numel() == 0


def test_a_target_behind_its_row_is_noticed():
    with pytest.raises(AssertionError, match="a mel target lies behind its row"):
        packed(mel_targets=((7, 1, X), (8, X, 9)))


def test_it_travels_from_worker_processes():
    packing = packed()
    again = pickle.loads(pickle.dumps(packing))
    assert again.row_lengths == packing.row_lengths
    assert torch.equal(again.order, packing.order)
