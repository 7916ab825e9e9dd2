"""Push a run's voice: at its end, or later with scripts/push.py, and remember whether it worked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tortoise_hf.config import Config, DataConfig, HubConfig
from tortoise_hf.distributed import raise_together
from tortoise_hf.errors import UserError
from tortoise_hf.export import is_export
from tortoise_hf.export_run import export_run
from tortoise_hf.hub.adapter_only import check_shareable_base
from tortoise_hf.hub.client import ATTEMPTS, VOICE_MARKER, check_access, require_consent
from tortoise_hf.hub.conditioning import write_clips
from tortoise_hf.hub.push import Pushed, push_folder
from tortoise_hf.hub.voice_folder import assemble_voice, hub_settings
from tortoise_hf.latents import CLIPS_FOLDER
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.places import absolute_settings, local_paths
from tortoise_hf.run import CLIPS_FILE, EXPORT_DIR, RUN_FILE

HUB_DIR = ".hub"
"""In a run's folder: what is about to be pushed."""
NOTE = "push.json"
"""In a run's folder: the last push, and what is still owed."""


def push_run(
    run_dir: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    attempts: int = ATTEMPTS,
    wait: Callable[[float], object] | None = None,
    endpoint: str | None = None,
    say: Callable[[str], object] = print,
) -> Pushed:
    """Push a run's export (made now if it isn't there) as a voice.

    Args:
        run_dir: the run's folder.
        changes: values of the hub section that win over the run's own.
        attempts: see `retry`, as for `wait`.
        wait: see there.
        endpoint: the Hub's address; default as HF_ENDPOINT says.
        say: takes a line for the user.

    Raises:
        UserError: if it isn't a run, repository or consent are missing, or the Hub refuses or can't be reached. What
            failed is noted in the run's folder.
    """
    run_dir = Path(run_dir)
    if not (run_dir / RUN_FILE).is_file():
        raise UserError(
            f"{run_dir} is not a run's folder: it has no {RUN_FILE}. Name the training.output_dir of a run."
        )
    settings = absolute_settings(json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8")))
    hub = hub_settings(settings, changes)
    if hub.repo_id is None:
        raise UserError(f"{run_dir} names no repository; give one, for instance --repo_id you/your-voice.")
    require_consent(hub)
    if hub.adapter_only:
        check_shareable_base(settings["model"]["base"])  # before an export is made
    export_dir = run_dir / EXPORT_DIR
    if not is_export(export_dir):
        export_dir = run_dir / HUB_DIR / EXPORT_DIR
        export_run(run_dir, export_dir, overwrite=True)
    keep_clips(run_dir, DataConfig(**settings["data"]), say)
    pushed = push_voice(
        export_dir,
        run_dir / HUB_DIR / "voice",
        run_dir,
        hub,
        settings["model"]["weights_dir"],
        local_paths=local_paths(settings, run_dir),
        attempts=attempts,
        wait=wait,
        endpoint=endpoint,
    )
    shutil.rmtree(run_dir / HUB_DIR, ignore_errors=True)
    return pushed


def push_voice(
    export_dir: Path,
    staging: Path,
    run_dir: Path,
    hub: HubConfig,
    weights_dir: str | None = None,
    gpt: TortoiseGPT | None = None,
    **options: Any,
) -> Pushed:
    """Make a voice of an export and push it; how that went is noted in the run's folder.

    Args:
        export_dir: see `assemble_voice`, as for run_dir, hub, weights_dir and gpt.
        staging: folder to make the voice in.
        run_dir: the run's folder.
        hub: where to.
        weights_dir: folder with the released files, if there is one.
        gpt: see `assemble_voice`.
        options: of `push_folder`.

    Raises:
        UserError: as `push_folder`.
    """
    folder = assemble_voice(export_dir, staging, run_dir, hub, weights_dir, gpt)
    step = json.loads((folder / VOICE_MARKER).read_text(encoding="utf-8"))["step"]
    try:
        pushed = push_folder(
            folder,
            hub.repo_id,
            message=f"Voice of step {step}",
            marker=VOICE_MARKER,
            private=hub.private,
            revision=hub.revision,
            **options,
        )
    except Exception as error:
        note(run_dir, hub.repo_id, step, pending=str(error))
        raise
    note(run_dir, hub.repo_id, step, pushed)
    return pushed


def keep_clips(run_dir: Path, data: DataConfig, say: Callable[[str], object] = print) -> None:
    """Keep reference clips with a run, unless it has some; a warning says why it couldn't be done."""
    try:
        write_clips(data, json.loads((run_dir / CLIPS_FILE).read_text(encoding="utf-8")), run_dir)
    except (OSError, UserError) as error:
        say(
            f"Warning: there are no reference clips for the voice, as its recordings can't be read ({error}). Put a "
            f"few into {run_dir / CLIPS_FOLDER}."
        )


def note(run_dir: Path, repo_id: str, step: int, pushed: Pushed | None = None, pending: str | None = None) -> None:
    """Write down what was pushed, or why it wasn't."""
    value = {"repo_id": repo_id, "step": step, "pending": pending}
    value |= {} if pushed is None else {"commit": pushed.commit, "url": pushed.url}
    staging = run_dir / f".{NOTE}.tmp"
    staging.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    staging.replace(run_dir / NOTE)


def check_before_training(cfg: Config, accelerator: Accelerator) -> None:
    """See that the pushes a config asks for can work, before anything is fetched or trained; every process calls it.

    Raises:
        UserError: on every process, see `check_access`, and `check_shareable_base` where the adapter alone is pushed.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            if cfg.hub.adapter_only and cfg.hub.repo_id is not None:
                check_shareable_base(cfg.model.base)
            warning = check_access(cfg.hub)
            if warning is not None:
                print(warning)
        except UserError as error:
            problem = str(error)
    raise_together(accelerator, problem)


def push_at_end(run_dir: str | Path) -> str:
    """Push a finished run's voice; what to print about it. Never fails.

    Args:
        run_dir: the run's folder.
    """
    try:
        pushed = push_run(run_dir)
    except UserError as error:
        return f"Not pushed: {error}\nThe run is complete; push it later with: python scripts/push.py {run_dir}"
    except Exception as error:  # a push must not take a finished run's success away
        return (
            f"Not pushed ({type(error).__name__}: {error}).\nThe run is complete; push it later with: "
            f"python scripts/push.py {run_dir}"
        )
    what = "Pushed" if pushed.changed else "Already up to date"
    return (
        f"{what}: {pushed.url} (commit {pushed.commit[:8]}). Pull it anywhere: python scripts/pull.py {pushed.repo_id}"
    )
