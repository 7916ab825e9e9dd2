"""Push a checkpoint while its run goes on: `python -m tortoise_hf.hub.worker RUN STAGING`, started by `HubCallback`.

Hashing and sending gigabytes in a process of its own takes neither Python's lock from the training nor, as it is run
with the lowest priority, the processor. Everything it needs is on the disk. Its input tells it when to stop: "stop"
means no more tries, and the end of the input that the run is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tortoise_hf.models.gpt import TortoiseGPT


def main(run_dir: Path, staging: Path) -> None:
    """Push, or print a sentence on why it wasn't possible and leave with exit code 1."""
    stop = _obey_input()
    from tortoise_hf.errors import UserError

    try:
        push_checkpoint(run_dir, staging, stop)
    except UserError as error:
        raise SystemExit(str(error)) from error


def push_checkpoint(run_dir: Path, staging: Path, stop: threading.Event) -> None:
    """Push the voice and the checkpoints that `HubCallback` has put into a folder.

    Args:
        run_dir: the run's folder.
        staging: `step.json`; `checkpoint/` for a voice; `resume/` for checkpoints to go on from.
        stop: set when there shall be no more tries.

    Raises:
        UserError: if the Hub refuses or can't be reached; what became of a voice is noted in the run's folder.
    """
    import torch

    from tortoise_hf.hub.checkpoints import push_checkpoints
    from tortoise_hf.hub.publish import HUB_DIR, push_voice
    from tortoise_hf.hub.voice_folder import hub_settings
    from tortoise_hf.places import absolute_settings, local_paths
    from tortoise_hf.run import RUN_FILE, export_summary

    torch.set_num_threads(1)
    record, told = (_read_json(path) for path in (run_dir / RUN_FILE, staging / "step.json"))
    settings = absolute_settings(record)
    hub, paths = hub_settings(settings), local_paths(settings, run_dir)
    if (staging / "resume").is_dir():
        push_checkpoints(staging / "resume", hub.checkpoint_repo_id, told["step"], local_paths=paths, wait=stop.wait)
    if (staging / "checkpoint").is_dir():
        log_history = _read_json(staging / "checkpoint" / "trainer_state.json")["log_history"]
        summary = export_summary(record, log_history, told["lineage"])
        companions, weights_dir = run_dir / HUB_DIR / "companions", settings["model"]["weights_dir"]
        gpt = _write_export(companions, staging, told, summary, settings["model"], hub.adapter_only)
        voice = (staging / "export", staging / "voice", run_dir, hub, weights_dir, gpt)
        push_voice(*voice, local_paths=paths, wait=stop.wait)


def _write_export(
    companions: Path, staging: Path, told: dict, summary: dict, model_settings: dict, adapter_only: bool
) -> TortoiseGPT | None:
    """Gives the whole model where the export doesn't hold it."""
    from tortoise_hf.adapter_files import is_adapter
    from tortoise_hf.config import ModelConfig
    from tortoise_hf.export import export_model
    from tortoise_hf.hub.pull import is_hub_name
    from tortoise_hf.hub.voice_folder import write_checkpoint_export
    from tortoise_hf.models.pretrained import load_trained, resolve_base

    checkpoint, out_dir, step = staging / "checkpoint", staging / "export", told["step"]
    if not is_adapter(checkpoint):
        write_checkpoint_export(checkpoint, out_dir, companions, step, summary)
        return None
    if is_hub_name(model_settings["base"]):  # the commit that the run began with
        model_settings = model_settings | {"base": told["lineage"][0]}
    files = resolve_base(ModelConfig(**model_settings))
    model = load_trained(checkpoint, files)  # whole weights exist nowhere yet
    if adapter_only:
        write_checkpoint_export(checkpoint, out_dir, companions, step, summary)
        return model
    export_model(model, out_dir, files=files, step=step, summary=summary, adapter=checkpoint)
    return None


def _obey_input() -> threading.Event:
    stop = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            stop.set()
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return stop


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for the run, which then tells this process
        signal.signal(number, signal.SIG_IGN)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
