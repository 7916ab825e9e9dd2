"""A copy of a run in another folder, such as one on Drive, from which it goes on when its machine is gone.

Kept are the newest and the best checkpoint, checked after copying, what is needed to go on from them, and the encoded
clips: another kind of machine might encode them a little differently, and a run goes on with the same clips only. Files
that go are emptied first: Drive moves what is deleted into its trash, where it would go on to take space.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from tortoise_hf.checkpoint import Checkpoint, complete_checkpoints, find_damage
from tortoise_hf.errors import UserError
from tortoise_hf.run import CLIPS_FILE, FIXED_SETTINGS, REPORT_NAME, RUN_FILE, fixed_setting
from tortoise_hf.units import format_bytes

SMALL_FILES = (RUN_FILE, CLIPS_FILE, REPORT_NAME, "log.jsonl")
SMALL_FOLDERS = ("samples", "conditioning")
CACHE_FOLDERS = ("clips", "texts")
"""Of `data.cache_dir`, what isn't the recordings themselves."""
PREPARED_DIR = "prepared"
"""Where the copy has them."""
SECONDS_BETWEEN_LOOKS = 5.0


def save_copy(run_dir: Path, copy_dir: Path, cache_dir: Path) -> int | None:
    """Bring the copy up to date; the step it holds then, or None if there is nothing to copy yet.

    The older checkpoints of the copy go only when the newer ones are whole.

    Args:
        run_dir: the run's folder.
        copy_dir: of the copy.
        cache_dir: `data.cache_dir` of the run, and of no other.

    Raises:
        UserError: if there is too little space, the folder can't be written or holds another run; what was in the copy
            stays.
    """
    wanted = _worth_keeping(run_dir)
    if not wanted or not (run_dir / RUN_FILE).is_file():
        return None
    _refuse_another_run(run_dir, copy_dir)
    missing = [one for one in wanted if not _is_there(one, copy_dir)]
    try:
        copy_dir.mkdir(parents=True, exist_ok=True)
        for leftover in copy_dir.glob(".*.tmp"):
            remove_emptied(leftover)
        for checkpoint in missing:
            check_space(checkpoint.path, copy_dir)
            copy_folder(checkpoint.path, copy_dir / checkpoint.path.name)
            problem = find_damage(copy_dir / checkpoint.path.name)
            if problem is not None:
                remove_emptied(copy_dir / checkpoint.path.name)
                raise UserError(f"The copy of {checkpoint.path.name} in {copy_dir} is damaged: {problem}.")
        for name in SMALL_FILES:
            if (run_dir / name).is_file():
                shutil.copyfile(run_dir / name, copy_dir / f".{name}.part")
                (copy_dir / f".{name}.part").replace(copy_dir / name)
        _copy_folders(SMALL_FOLDERS, run_dir, copy_dir)
        _copy_folders(CACHE_FOLDERS, cache_dir, copy_dir / PREPARED_DIR)
    except OSError as error:
        raise UserError(f"{copy_dir} can't be written ({error.strerror or error}).") from error
    names = {one.path.name for one in wanted}
    for old in complete_checkpoints(copy_dir):
        if old.path.name not in names:
            remove_emptied(old.path)
    return wanted[0].step


def restore_copy(copy_dir: Path, run_dir: Path, cache_dir: Path) -> int | None:
    """Bring a run back from its copy, unless the run's folder is as new; the step it now holds, or None.

    Arguments as of `save_copy`.

    Raises:
        UserError: if no checkpoint of the copy is sound, the two are different runs, or the disk is full.
    """
    kept, here = complete_checkpoints(copy_dir), complete_checkpoints(run_dir)
    if not kept or not (copy_dir / RUN_FILE).is_file() or (here and here[0].step >= kept[0].step):
        return None
    _refuse_another_run(run_dir, copy_dir)
    sound = [one for one in kept if find_damage(one.path) is None]
    if not sound:
        raise UserError(f"{copy_dir} holds no sound checkpoint; move it away to begin anew.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in SMALL_FILES:  # first: from then on the folder is a run's
            if (copy_dir / name).is_file():
                shutil.copyfile(copy_dir / name, run_dir / name)
        for checkpoint in sound:
            if not (run_dir / checkpoint.path.name).is_dir():
                check_space(checkpoint.path, run_dir)
                copy_folder(checkpoint.path, run_dir / checkpoint.path.name)
        _copy_folders(SMALL_FOLDERS, copy_dir, run_dir)
        _copy_folders(CACHE_FOLDERS, copy_dir / PREPARED_DIR, cache_dir)
    except OSError as error:
        raise UserError(f"{run_dir} can't be written ({error.strerror or error}).") from error
    return sound[0].step


class Keeper:
    """Keeps the copy up to date while the run trains, in a thread."""

    def __init__(self, run_dir: Path, copy_dir: Path, cache_dir: Path) -> None:
        """Begin; arguments as of `save_copy`."""
        self.run_dir, self.copy_dir, self.cache_dir = run_dir, copy_dir, cache_dir
        self.state = ""
        """What the copy holds, or why it couldn't be brought up to date; a sentence."""
        self._seen: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Copy what came last, and end."""
        self._stop.set()
        self._thread.join()
        self._copy()

    def _work(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            names = [one.path.name for one in complete_checkpoints(self.run_dir)]
            if names != self._seen:
                self._seen = names
                self._copy()

    def _copy(self) -> None:
        try:
            step = save_copy(self.run_dir, self.copy_dir, self.cache_dir)
            if step is not None:
                self.state = f"Step {step:,} is kept in {self.copy_dir}."
        except UserError as error:
            self.state = f"Warning: {error}"
        except Exception as error:  # or the thread would end, and nothing more would be kept, without a word
            self.state = f"Warning: copying to {self.copy_dir} failed ({type(error).__name__}: {error})."


def folder_bytes(folder: Path) -> int:
    """Size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder so that it has its name only when all of it is there; an older one of that name is replaced."""
    staging = target.with_name(f".{target.name}.tmp")
    remove_emptied(staging)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            (staging / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / path.relative_to(source))
    remove_emptied(target)
    staging.rename(target)


def remove_emptied(folder: Path) -> None:
    """Delete a folder whose files are made empty before, so that a trash keeps names and no bytes."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)
    shutil.rmtree(folder, ignore_errors=True)


def _refuse_another_run(run_dir: Path, copy_dir: Path) -> None:
    """Runs of one name aren't always one run."""
    try:
        here, there = (json.loads((folder / RUN_FILE).read_text(encoding="utf-8")) for folder in (run_dir, copy_dir))
    except (OSError, ValueError):  # one of them isn't there yet
        return
    settings = [[fixed_setting(one["config"], key) for key in FIXED_SETTINGS] for one in (here, there)]
    if settings[0] != settings[1] or here["data_fingerprint"] != there["data_fingerprint"]:
        raise UserError(
            f"{copy_dir} holds another run than {run_dir} (other clips, or other settings that can't change); choose "
            "another Experiment_Name, or move one of the two away."
        )


def _worth_keeping(run_dir: Path) -> list[Checkpoint]:
    """The newest checkpoint, and the best if that is another."""
    found = complete_checkpoints(run_dir)
    if not found:
        return []
    try:
        best = json.loads((found[0].path / "trainer_state.json").read_text())["best_model_checkpoint"]
    except (OSError, ValueError, KeyError):  # rotated away this moment
        return []
    return [found[0], *(one for one in found[1:] if one.path.name == best)]


def _is_there(checkpoint: Checkpoint, copy_dir: Path) -> bool:
    there = copy_dir / checkpoint.path.name / "manifest.json"
    try:
        return there.read_bytes() == (checkpoint.path / "manifest.json").read_bytes()
    except OSError:
        return False


def check_space(source: Path, target: Path) -> None:
    """Refuse to copy a folder to where it doesn't fit.

    Raises: UserError: with what is needed and what is free.
    """
    needed, free = folder_bytes(source), shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"{target} has {format_bytes(free)} left and {source.name} needs {format_bytes(needed)}. Make room there "
            "(on Drive: empty the trash), or keep less per checkpoint with training.optimizer_state 8bit or none."
        )


def _copy_folders(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy folders that are there; files of the same size are taken to be the same."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True, copy_function=_copy_if_other)


def _copy_if_other(source: str, target: str) -> None:
    if not os.path.exists(target) or os.path.getsize(source) != os.path.getsize(target):
        shutil.copyfile(source, target)
