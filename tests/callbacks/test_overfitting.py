from types import SimpleNamespace

import pytest

from tortoise_hf.callbacks.overfitting import OverfittingCallback, begins_to_overfit


def history(eval_losses, train_losses):
    """Evaluations at steps 0, 10, 20, ...; a training loss at step 5, 15, ..."""
    entries = [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(eval_losses)]
    entries += [{"step": 10 * i + 5, "loss": loss} for i, loss in enumerate(train_losses)]
    return sorted(entries, key=lambda entry: entry["step"])


@pytest.mark.parametrize(
    ("eval_losses", "train_losses", "expected"),
    [
        ([5.0, 4.0, 4.1, 4.2], [5.0, 4.0, 3.0], True),
        ([5.0, 4.0, 4.1, 4.2], [3.0, 4.0, 5.0], False),  # training gets worse as well: not learnt by heart
        ([5.0, 4.0, 4.1], [5.0, 4.0], False),  # one rise may be chance
        ([5.0, 4.0, 4.1, 4.0], [5.0, 4.0, 3.0], False),
        ([5.0, 4.0, 4.1, 4.2, 4.3], [5.0, 4.0, 3.0, 2.0], False),  # said already
        ([4.0, 4.1, 4.2], [5.0, 4.0], False),  # nothing to compare the training loss with
        ([], [5.0], False),
    ],
)
def test_it_takes_two_rises_and_a_falling_training_loss(eval_losses, train_losses, expected):
    assert begins_to_overfit(history(eval_losses, train_losses)) is expected


def test_the_warning_names_the_best_step_once(capsys):
    eval_losses, train_losses = [5.0, 4.0, 4.1, 4.2, 4.3], [5.0, 4.0, 3.0, 2.0]
    for count in range(1, 6):
        log = [entry for entry in history(eval_losses, train_losses) if entry["step"] <= 10 * (count - 1)]
        state = SimpleNamespace(is_world_process_zero=True, log_history=log, global_step=10 * (count - 1))
        OverfittingCallback().on_evaluate(None, state, None)
    out = capsys.readouterr().out
    assert out.count("Warning") == 1
    assert "lowest at step 10 (4.000)" in out
