"""The notebook's form fields as settings: under the Colab guide's names where it has one."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

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
PRECISIONS = {"auto": None, "on": "fp16", "off": "no"}
"""Values of the field Fp16; auto is the quickest precision the card has."""


def read_fields(fields: Mapping[str, Any], others: str = "") -> dict[str, Any]:
    """Form fields as `section.name: value`; what is left empty is left to the plan.

    Args:
        fields: by their names in `FIELDS`.
        others: more settings, as `optim.warmup_steps: 20, training.seed: 7`.

    Raises: UserError: if a field isn't known or `others` isn't of that form.
    """
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise UserError(f"There is no field {', '.join(unknown)}; the fields are {', '.join(FIELDS)}.")
    values = {FIELDS[name]: _value(written) for name, written in fields.items() if str(written).strip()}
    try:
        more = yaml.safe_load("{" + others + "}")
    except yaml.YAMLError:
        more = None
    if not isinstance(more, dict) or not all(re.fullmatch(r"\w+\.\w+", str(key)) for key in more):
        raise UserError(
            f"Other_Settings can't be read: {others!r}. Write them as optim.warmup_steps: 20, training.seed: 7"
        )
    return values | more


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
    from tortoise_hf.cli import load_config

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
