"""The guide for those who come from the notebook names settings that exist, and its numbers are the plan's."""

import dataclasses
import re

import pytest
from conftest import REPOSITORY

from tortoise_hf import plan
from tortoise_hf.cli import SECTIONS

GUIDE = (REPOSITORY / "docs" / "from-the-colab-guide.md").read_text(encoding="utf-8")
SETTINGS = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}


def test_every_setting_it_names_exists():
    named = set(re.findall(r"`((?:data|model|optim|training|callbacks)\.\w+)", GUIDE))
    assert len(named) > 30
    assert named <= SETTINGS


@pytest.mark.parametrize(
    "field",
    ["`Experiment_Name", "`Dataset_Training_Path", "ValidationDataset_Training_Path", "dataset names", "Fp16",
     "TrainingRate", "TrainBS", "ValBS", "ValFreq", "LRDecaySteps", "PrintFreq", "SaveCheckpointFreq"],
)  # fmt: skip
def test_every_field_of_the_notebook_has_a_home(field):
    fields = GUIDE.split("\n## ")[1]
    (row,) = [line for line in fields.splitlines() if line.startswith("|") and field in line.split("|")[1]]
    assert row.count("|") == 5


def test_its_numbers_are_the_plans():
    low, high = plan.EPOCHS
    assert f"{plan.HOURS_HEARD} hours of listening, {low} to {high} epochs" in GUIDE
    assert f"{plan.MOST_CLIPS_AT_ONCE['cuda']} on a GPU, {plan.MOST_CLIPS_AT_ONCE['cpu']} on a CPU" in GUIDE
    assert f"after {plan.PATIENCE} evaluations without improvement" in GUIDE
    assert f"fewer than {plan.ENOUGH_CLIPS_AT_ONCE} clips" in GUIDE
    assert f"auto: {plan.EVALUATIONS} evaluations" in GUIDE
    assert (plan.LARGEST_BATCH, plan.SMALLEST_BATCH, plan.STEPS_PER_EPOCH) == (128, 8, 8)
