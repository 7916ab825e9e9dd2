import pytest

from tortoise_hf.summary import advise


def curve(*losses):
    return [{"step": 10 * index, "eval_loss": loss} for index, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("evaluations", "said", "not_said"),
    [
        (curve(5.0, 4.0, 3.0), "still falling at step 20; train longer", "more recordings"),
        (curve(5.0, 3.0, 3.5), "lowest at step 10 of 20", "train longer"),
        (curve(5.0, 3.0, 3.5), "--optim.learning_rate 5e-06", "train longer"),
        (curve(5.0, 3.0, 2.999), "levelled off since step 10", "rose after"),
        (curve(5.0, 2.999, 3.0), "levelled off since step 10", "rose after"),
        (curve(5.0, 5.5, 5.2), "--optim.learning_rate 1e-06", "train longer"),
        ([], "nothing was evaluated", "falling"),
        (curve(5.0), "nothing was evaluated", "falling"),
    ],
)
def test_advice_follows_the_curve(evaluations, said, not_said):
    advice = "\n".join(advise(evaluations, last_step=20, max_steps=20, learning_rate=1e-5))
    assert said in advice
    assert not_said not in advice
    if "train longer" in advice:
        assert "--training.max_steps 40" in advice
