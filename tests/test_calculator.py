import json

import pytest
from conftest import GOLDEN

from tortoise_hf.calculator import calculate

ROWS = json.loads((GOLDEN / "param_calc.json").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['n_train']}-{row['n_val']}-{row['bs_train']}")
def test_every_row_of_the_guides_calculator(row):
    found = calculate(row["n_train"], row["n_val"], row["bs_train"], row["bs_val"], row["first_decay"])
    assert found.train_batch_size == row["train_bs"]
    assert found.eval_batch_size == row["val_bs"]
    assert list(found.milestones) == row["lr_decay_steps"]
    assert (found.logging_steps, found.eval_steps) == (row["print_freq"], row["val_freq"])
    assert found.save_steps == row["save_checkpoint_freq"]
    assert list(found.warnings) == row["warnings"]


def test_a_batch_of_ones_own_moves_the_milestones_only():
    found = calculate(150, 40, batch_size=64, fit_batch=False)
    assert (found.train_batch_size, found.milestones) == (64, (40, 80, 112, 144))
    assert calculate(10, 0, batch_size=64, fit_batch=False).milestones == (20, 40, 56, 72)
    assert calculate(10, 0).eval_batch_size == 1
