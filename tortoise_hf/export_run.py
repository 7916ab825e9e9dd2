"""Export a run, or one of its checkpoints, again: another dtype, another layout, another step.

A run exports its best checkpoint when it ends; this reads what the run left in its folder and does the same later.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tortoise_hf.adapter_files import is_adapter
from tortoise_hf.checkpoint import complete_checkpoints, find_damage
from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export import ExportReport, export_model
from tortoise_hf.models.pretrained import load_base_weights, load_trained, resolve_base
from tortoise_hf.places import absolute_settings
from tortoise_hf.run import RUN_FILE, export_summary


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint with what its run remembers of it."""

    path: Path
    step: int
    record: dict[str, Any]
    """Content of the run's run.json: settings, number of clips."""
    state: dict[str, Any]
    """Content of the checkpoint's trainer_state.json: log, best step."""


def find_trained(path: str | Path) -> TrainedCheckpoint:
    """The checkpoint meant by a run's folder (its best one, or the newest without evaluations) or named directly.

    Raises: UserError: if there is none, it is damaged, or it lies outside a run's folder.
    """
    path = Path(path)
    if (path / RUN_FILE).is_file():
        found = complete_checkpoints(path)
        if not found:
            raise UserError(f"{path} is a run without a checkpoint yet; train longer, or name a checkpoint folder.")
        checkpoint = found[0].path
        best = _read_json(checkpoint / "trainer_state.json").get("best_model_checkpoint")
        if best is not None and (path / best).is_dir():
            checkpoint = path / best
    elif (path / "trainer_state.json").is_file():
        checkpoint = path
    else:
        raise UserError(
            f"{path} is neither a run's folder (with {RUN_FILE}) nor one of its checkpoint-STEP folders; name the "
            f"training.output_dir of a run."
        )
    problem = find_damage(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} is damaged ({problem}); name another checkpoint of the run.")
    record_path = checkpoint.parent / RUN_FILE
    if not record_path.is_file():
        raise UserError(
            f"{checkpoint} lies outside its run's folder: {record_path} is missing and tells which base it started "
            f"from. Put both into one folder."
        )
    state = _read_json(checkpoint / "trainer_state.json")
    return TrainedCheckpoint(checkpoint, state["global_step"], _read_json(record_path), state)


def export_run(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "float32",
    attention_buffers: bool = True,
    overwrite: bool = False,
    weights_dir: str | None = None,
) -> ExportReport:
    """Export a run's best checkpoint, or a named one.

    Args:
        path: the run's folder or one of its checkpoints.
        out_dir: see `export_model`, as for dtype, attention_buffers and overwrite.
        dtype: of the `.pth` file.
        attention_buffers: whether the `.pth` file has them.
        overwrite: replace an earlier export.
        weights_dir: folder with the released files, if it isn't where the run had it.

    Raises: UserError: as `find_trained`, `resolve_base` and `export_model`.
    """
    trained = find_trained(path)
    model_config = ModelConfig(**absolute_settings(trained.record)["model"])
    if weights_dir is not None:
        model_config = dataclasses.replace(model_config, weights_dir=weights_dir)
    files = resolve_base(model_config)
    return export_model(
        load_trained(trained.path, files),
        out_dir,
        files=files,
        step=trained.step,
        summary=export_summary(trained.record, trained.state["log_history"], files.lineage),
        dtype=dtype,
        attention_buffers=attention_buffers,
        base_state=None if model_config.from_scratch else load_base_weights(files)[1],
        adapter=trained.path if is_adapter(trained.path) else None,
        overwrite=overwrite,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); name another checkpoint or run.") from error
