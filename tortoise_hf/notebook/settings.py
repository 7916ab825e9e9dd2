"""The notebook's form fields as settings: under the Colab guide's names where it has one."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tortoise_hf.cli import SECTIONS, load_config
from tortoise_hf.config import Config
from tortoise_hf.errors import UserError

GUIDE_FIELDS = {
    "TrainingRate": "optim.learning_rate",
    "TrainBS": "training.batch_size",
    "ValBS": "training.eval_batch_size",
    "ValFreq": "training.eval_steps",
    "LRDecaySteps": "optim.milestones",
    "PrintFreq": "training.logging_steps",
    "SaveCheckpointFreq": "training.save_steps",
}
"""Fields of the Colab guide and the settings they are here. Its names and paths of datasets and Fp16 are a `Project`'s
own."""
OTHER_FIELDS = {
    "Epochs": "training.num_train_epochs",
    "Max_Steps": "training.max_steps",
    "Micro_Batch": "training.micro_batch_size",
    "Optimizer_State": "training.optimizer_state",
}
FIELDS = GUIDE_FIELDS | OTHER_FIELDS
_OWN_FIELDS = {setting: field for field, setting in FIELDS.items()} | {
    "data.root": "Dataset_Training_Path",
    "data.eval_list": "ValidationDataset_Training_Path",
    "model.base": "Base",
    "training.output_dir": "Experiment_Name",
    "training.plan": "Plan",
    "hub.checkpoint_repo_id": "Keep_On_Hub",
    "hub.repo_id": "Repository",
    "hub.consent": "Consent",
}
_PLACES = {"Data_Settings": "Data_Settings in section 3", "Other_Settings": "Other_Settings in section 5"}
_EXAMPLES = {
    "Data_Settings": "data.min_seconds: 1, lora.rank: 16",
    "Other_Settings": "optim.warmup_steps: 20, training.seed: 7",
}
_KNOWN = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
PRECISIONS = {"auto": None, "on": "fp16", "off": "no"}
"""Values of the field Fp16; auto is the quickest precision the card has."""


def read_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Form fields as `section.name: value`; what is left empty is left to the plan.

    Args:
        fields: by their names in `FIELDS`.

    Raises: UserError: if a field isn't known.
    """
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise UserError(f"There is no field {', '.join(unknown)}; the fields are {', '.join(FIELDS)}.")
    return {FIELDS[name]: _value(written) for name, written in fields.items() if str(written).strip()}


def read_others(field: str, written: str) -> dict[str, Any]:
    """The settings that have no form field of their own, out of one of the two fields that take them all.

    Args:
        field: Data_Settings, for what the check and the measurement go by, or Other_Settings, for all others.
        written: such as `optim.warmup_steps: 20, training.seed: 7`.

    Raises: UserError: if it can't be read, or a setting belongs into the other field.
    """
    try:
        found = yaml.safe_load("{" + written + "}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(re.fullmatch(r"\w+\.\w+", str(key)) for key in found):
        raise UserError(f"{field} can't be read: {written!r}. Write it as {_EXAMPLES[field]}")
    for key in found:
        if _place_of(key) != field:
            raise UserError(f"{key} can't be set in {field}; write it into {_PLACES[_place_of(key)]}.")
    return found


def where_to_write(message: str) -> str:
    """What a script says, and which fields take the settings that it names."""
    named = dict.fromkeys(re.findall(r"\b(?:" + "|".join(SECTIONS) + r")\.[a-z]\w*", message))
    hints = [f"{key} is the field {_OWN_FIELDS[key]}" for key in named if key in _OWN_FIELDS]
    for field, place in _PLACES.items():
        keys = [key for key in named if key in _KNOWN - set(_OWN_FIELDS) and _place_of(key) == field]
        if keys:
            hints.append(f"{', '.join(keys)} {'goes' if len(keys) == 1 else 'go'} into {place}, as {_EXAMPLES[field]}")
    return f"{message}\nIn this notebook: {'; '.join(hints)}." if hints else message


def _place_of(key: str) -> str:
    """Which of the two fields a setting belongs to."""
    checked = key.split(".")[0] in ("data", "model", "lora") or key == "optim.optimizer"
    return "Data_Settings" if checked else "Other_Settings"


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """A settings file as the scripts read it, out of `section.name: value`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".", 1)
        sections.setdefault(section, {})[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "# Written by the notebook; scripts/train.py --config takes it, too.\n"
    path.write_text(head + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_settings(path: Path) -> Config:
    """The settings of a file.

    Raises: UserError: with the parser's sentence, if a name or value is wrong.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return load_config(["--config", str(path)], "")
    except SystemExit:
        raise UserError(said.getvalue().splitlines()[0].removeprefix("error: ")) from None


def _value(written: Any) -> Any:
    """A number, a list of them, or a word; as YAML, but 1e-5 is a number."""
    if not isinstance(written, str):
        return written
    text = written.strip()
    if re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)+\s*,?\s*\]?|\[\s*\d+\s*\]", text):
        return [int(number) for number in re.findall(r"\d+", text)]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
