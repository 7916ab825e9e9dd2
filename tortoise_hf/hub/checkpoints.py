"""Full checkpoints in a repository of their own, and back: a run goes on where another machine stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from tortoise_hf.checkpoint import MANIFEST, complete_checkpoints, find_damage
from tortoise_hf.config import Config
from tortoise_hf.errors import UserError
from tortoise_hf.hub.client import ATTEMPTS, CHECKPOINT_MARKER, explain, is_passing
from tortoise_hf.hub.pull import MOST_FILES, check_space, compare, is_safe_name
from tortoise_hf.hub.push import Pushed, push_folder
from tortoise_hf.hub.voice_folder import link_file
from tortoise_hf.places import PATH_SETTINGS, absolute_settings, public_settings
from tortoise_hf.retries import retries_in_one_line
from tortoise_hf.run import CLIPS_FILE, RUN_FILE

SCHEME = "hub:"
_CHECKPOINT_FILE = re.compile(
    r"^checkpoint-(\d+)/((adapter_)?config\.json|generation_config\.json|(adapter_)?model\.safetensors|optimizer\.pt"
    r"|rng\.pt|scheduler\.json|scaler\.json|trainer_state\.json|manifest\.json)$"
)
_README = """# Checkpoints of a run of tortoise_hf

Not a voice yet: weights, optimizer and counters, from which the run goes on exactly. On another machine, with the same
data and settings, add `--training.resume hub:{repo_id}`.
"""


def stage_checkpoints(run_dir: Path, names: Iterable[str], target: Path) -> None:
    """Link what another machine needs to go on: the record, the list of clips, and the checkpoints named."""
    for name in names:
        for path in (run_dir / name).iterdir():
            link_file(path, target / name / path.name)
    record = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    record["config"] = public_settings(absolute_settings(record))
    record.pop("cwd", None)
    (target / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(run_dir / CLIPS_FILE, target / CLIPS_FILE)


def push_checkpoints(
    folder: Path,
    repo_id: str,
    step: int,
    *,
    local_paths: Sequence[str] = (),
    attempts: int = ATTEMPTS,
    wait: Callable[[float], object] | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Make a private repository hold what `stage_checkpoints` put together, and no other checkpoints.

    Arguments as of `push_folder`.

    Raises: UserError: as `push_folder`.
    """
    (folder / "README.md").write_text(_README.format(repo_id=repo_id), encoding="utf-8")
    return push_folder(
        folder,
        repo_id,
        message=f"Checkpoint of step {step}",
        marker=CHECKPOINT_MARKER,
        private=True,
        replaces=("checkpoint-*",),
        local_paths=local_paths,
        attempts=attempts,
        wait=wait,
        endpoint=endpoint,
    )


@retries_in_one_line()
def fetch_run(cfg: Config, endpoint: str | None = None, say: Callable[[str], object] = print) -> Config:
    """Settings for going on with a run whose checkpoints are on the Hub; others are given back as they are.

    The checkpoints are put into `training.output_dir`, whole or not at all, unless ones as new are there. Several
    processes of a machine may call this at once; the first one fetches.

    Args:
        cfg: `training.resume` is hub:owner/name, or something else.
        endpoint: the Hub's address; default as HF_ENDPOINT says.
        say: takes a line for the user.

    Raises:
        UserError: if there are no checkpoints, they may not be read, or they are damaged.
    """
    if not cfg.training.resume.startswith(SCHEME):
        return cfg
    repo_id, _, revision = cfg.training.resume.removeprefix(SCHEME).partition("@")
    output_dir = Path(cfg.training.output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir.parent / f".{output_dir.name}.hub.lock"):
        here = complete_checkpoints(output_dir)
        step = here[0].step if here and (output_dir / RUN_FILE).is_file() else -1
        try:
            _fetch(HfApi(endpoint=endpoint), repo_id, revision or None, output_dir, step, cfg, say)
        except UserError:
            raise
        except Exception as error:  # whatever the client's HTTP library raises
            if step < 0 or not is_passing(error):
                raise UserError(explain(error, repo_id, revision)) from error
            say(f"{explain(error, repo_id)} Going on with the checkpoint of step {step} that is here.")
    return dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, resume="auto"))


def _fetch(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    output_dir: Path,
    step_here: int,
    cfg: Config,
    say: Callable[[str], object],
) -> None:
    commit = api.model_info(repo_id, revision=revision).sha
    tree = list(islice(api.list_repo_tree(repo_id, recursive=True, revision=commit), MOST_FILES))
    entries = {
        entry.path: entry
        for entry in tree
        if isinstance(entry, RepoFile)
        and is_safe_name(entry.path)
        and (_CHECKPOINT_FILE.match(entry.path) or entry.path in (RUN_FILE, CLIPS_FILE))
    }
    steps = {int(match[1]) for name in entries if (match := _CHECKPOINT_FILE.match(name))}
    if not steps or RUN_FILE not in entries:
        raise UserError(
            f"{repo_id} holds no checkpoints of this program (with hub.checkpoint_repo_id they are pushed there). A "
            f"voice can be the start of a new run: --model.base {repo_id}."
        )
    if max(steps) <= step_here:
        say(f"{output_dir} holds step {step_here} already, {repo_id} step {max(steps)}; going on with what is here.")
        return
    check_space(entries.values(), output_dir.parent, repo_id)
    names = [f"checkpoint-{step}" for step in sorted(steps)]
    staging = output_dir.parent / f".{output_dir.name}.from-hub"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for name, entry in entries.items():
            # Beside the run's folder, not into the cache: a checkpoint is several gigabytes and is needed once.
            path = Path(hf_hub_download(repo_id, name, revision=commit, local_dir=staging, endpoint=api.endpoint))
            compare(path, entry.lfs.sha256 if entry.lfs is not None else entry.blob_id, f"{repo_id}/{name}")
        _take_over(staging, names, output_dir, repo_id, cfg)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"Fetched {', '.join(names)} from {repo_id} into {output_dir}.")


def _take_over(staging: Path, names: Sequence[str], output_dir: Path, repo_id: str, cfg: Config) -> None:
    for name in names:
        problem = find_damage(staging / name) if (staging / name / MANIFEST).is_file() else "it has no manifest"
        if problem is not None:
            raise UserError(f"{repo_id}/{name} is not a sound checkpoint ({problem}). Nothing was kept.")
    record = json.loads((staging / RUN_FILE).read_text(encoding="utf-8"))
    record["config"] = with_local_paths(record["config"], cfg)
    (staging / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    output_dir.mkdir(exist_ok=True)
    # The record first: the folder is a run's from then on, and if this stops half-way the same command fetches again.
    for name in (RUN_FILE, CLIPS_FILE):
        if (staging / name).is_file():
            (staging / name).replace(output_dir / name)
    for name in names:
        shutil.rmtree(output_dir / name, ignore_errors=True)
        (staging / name).rename(output_dir / name)


def with_local_paths(settings: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """A fetched run's settings with this machine's places where they were taken out; the data itself is compared."""
    here = cfg.to_dict()
    for key in PATH_SETTINGS:
        section, name = key.split(".")
        mine = here[section][name]
        if name != "base" or public_settings(here)[section][name] == settings[section][name]:
            settings[section][name] = mine
    settings["hub"] = here["hub"]
    return settings
