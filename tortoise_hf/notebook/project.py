"""A voice in the making, as the notebook's cells see it: each cell is one call.

The work is done by the scripts in processes of their own; here they are started, watched and stopped. Their settings
file lies beside the run's folder, so that a shell can go on with the same run.
"""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tortoise_hf.errors import UserError
from tortoise_hf.notebook.cell import CellStopped, bars_of_the_hub, in_words
from tortoise_hf.notebook.machine import choose_precision, find_gpus
from tortoise_hf.notebook.places import find_place, find_token, mount_drive_for
from tortoise_hf.notebook.program import Program, find_script, interrupts_go_to, launch_command

if TYPE_CHECKING:
    from tortoise_hf.config import Config
    from tortoise_hf.plan import Plan
    from tortoise_hf.voice import Speech, Voice

# Said by a library of progress bars, which are not used here.
warnings.filterwarnings("ignore", message="IProgress not found")


class Project:
    """Recordings, settings and run of one voice."""

    @in_words
    def __init__(
        self,
        name: str,
        recordings: str,
        validation: str = "",
        *,
        keep_in: str = "",
        keep_on_hub: str = "",
        base: str = "released",
        settings: str = "",
        folder: str = "runs",
    ) -> None:
        """Find the recordings, and the run if one of this name was kept.

        Args:
            name: of the run; its folder is `folder`/name.
            recordings: a folder, an archive, owner/name of a dataset on the Hub, or "upload". Drive is mounted.
            validation: list of the clips to evaluate on; empty: found, or clips are split off.
            keep_in: folder, for instance on Drive, that keeps a copy to go on from.
            keep_on_hub: owner/name of a private repository that keeps checkpoints.
            base: what the run starts from, `model.base`.
            settings: others that the check and the measurement go by, see `read_others`.
            folder: of the runs.

        Raises: CellStopped: if a place isn't to be had, the copy is damaged, or the settings can't be read.
        """
        from tortoise_hf.notebook.settings import read_others

        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"Experiment_Name names a folder: letters, digits, - and _ only, got {name!r}.")
        self.name, self.run_dir = name, Path(folder) / name
        self.settings_path, self.log_path = (Path(folder) / f"{name}{suffix}" for suffix in (".yaml", ".log"))
        self.keep_dir = Path(keep_in) / name if keep_in else None
        self.cache_dir = Path(folder) / f"{name}.prepared"
        self.keep_on_hub = keep_on_hub
        self.gpus = find_gpus()
        self.precision = choose_precision(self.gpus)
        self._voice: Voice | None = None
        self._given: dict[str, Any] = {"data.root": find_place(recordings), "model.base": base}
        self._given |= {"training.output_dir": str(self.run_dir), "callbacks.progress": False}
        if keep_in:
            self._given["data.cache_dir"] = str(self.cache_dir)
        if validation:
            self._given["data.eval_list"] = validation
        if keep_on_hub:
            find_token()
            self._given["hub.checkpoint_repo_id"] = keep_on_hub
        self._given |= read_others("Data_Settings", settings)
        self._fields: dict[str, Any] = {}
        if keep_in:
            mount_drive_for(keep_in)
        self._bring_back()
        if not (keep_in or keep_on_hub):
            print("Keep_In and Keep_On_Hub are empty: if this machine is taken away, the run is lost.")

    # --- before training ---------------------------------------------------------------------------------------------

    @in_words
    def check_recordings(self) -> None:
        """Check and encode every clip, measure this machine, and show what was found.

        Raises: CellStopped: if there is nothing to train on, or something is missing.
        """
        from tortoise_hf.data.check import DatasetReport
        from tortoise_hf.histogram import draw_histogram
        from tortoise_hf.notebook import show
        from tortoise_hf.notebook.clips import some_clips
        from tortoise_hf.run import REPORT_NAME

        panel = show.Panel()
        self._run("prepare.py", ["--plan", str(self._plan_path)], lambda program: panel.show(show.text(program.last)))
        found = DatasetReport.from_json((self.run_dir / REPORT_NAME).read_text(encoding="utf-8"))
        panel.show(show.report(found, draw_histogram(found), some_clips(self.config().data, found)))

    @in_words
    def show_plan(self, plan: str = "auto") -> None:
        """Show the value of every setting, and why.

        Args:
            plan: who chooses what is left open, auto or tortoise (the guide's calculator).

        Raises: CellStopped: if the recordings haven't been checked.
        """
        from tortoise_hf.notebook import show

        self._given["training.plan"] = plan
        show.show(show.plan(self.plan()))

    @in_words
    def settings(self, Fp16: str = "auto", Other_Settings: str = "", **fields: Any) -> None:
        """Take the form's fields and show the plan with them.

        Args:
            Fp16: auto, on or off.
            Other_Settings: see `read_others`.
            fields: see `read_fields`.

        Raises: CellStopped: if a field can't be read.
        """
        from tortoise_hf.notebook import show
        from tortoise_hf.notebook.settings import PRECISIONS, read_fields, read_others

        if Fp16 not in PRECISIONS:
            raise UserError(f"Fp16 is one of {', '.join(PRECISIONS)}, got {Fp16!r}.")
        self.precision = PRECISIONS[Fp16] or choose_precision(self.gpus)
        self._fields = read_fields(fields) | read_others("Other_Settings", Other_Settings)
        show.show(show.plan(self.plan()))

    def plan(self) -> Plan:
        """The plan of the run with what has been set so far; arithmetic on what `check_recordings` measured.

        Raises: UserError: if that hasn't been done, or a setting is wrong.
        """
        from tortoise_hf.plan import Facts, Measurement, resolve
        from tortoise_hf.run import read_record

        if not self._plan_path.is_file():
            raise UserError("The recordings haven't been checked yet; run that cell first.")
        found = json.loads(self._plan_path.read_text(encoding="utf-8"))
        measured = found["measurement"]
        cfg = self.config()
        record = read_record(cfg)
        measurement = Measurement.from_dict(measured) if measured else None
        return resolve(cfg, Facts(**found["facts"]), measurement, earlier=record and record["config"])

    def config(self) -> Config:
        """Write the settings file; what it says.

        Raises: UserError: if a setting is wrong.
        """
        from tortoise_hf.notebook.settings import read_settings, write_settings

        write_settings(self.settings_path, self._given | self._fields)
        return read_settings(self.settings_path)

    # --- training ----------------------------------------------------------------------------------------------------

    @in_words
    def train(self) -> None:
        """Train, or go on, until the run ends or Interrupt is pressed; show how it goes.

        Raises: CellStopped: if it was interrupted (everything is saved then), or failed.
        """
        from tortoise_hf.notebook.keep import Keeper
        from tortoise_hf.notebook.watch import Watch

        self._forget_voice()
        self._bring_back()
        watch = Watch(self.run_dir)
        keeper = Keeper(self.run_dir, self.keep_dir, self.cache_dir) if self.keep_dir else None

        def look(program: Program) -> None:
            watch.look(program)
            if keeper is not None:
                watch.say(keeper.state)

        try:
            program = self._run("train.py", [], look)
        finally:
            if keeper is not None:
                watch.say(f"Copying what came last to {self.keep_dir} …")
                keeper.finish()
                watch.say(keeper.state)
        watch.finish(program)

    # --- afterwards --------------------------------------------------------------------------------------------------

    @in_words
    def export(self, folder: str) -> None:
        """Copy the exported voice into a folder, for instance on Drive.

        Raises: CellStopped: if there is too little space, or something else lies there.
        """
        from tortoise_hf.export import is_export
        from tortoise_hf.notebook import keep

        mount_drive_for(folder)
        source, target = self._export_dir(), Path(folder) / self.name
        if target.exists() and not is_export(target):
            raise UserError(f"{target} exists and isn't an export, so it was left alone; name another folder.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            keep.check_space(source, target.parent)
            keep.copy_folder(source, target)
        except OSError as error:
            raise UserError(f"{target} can't be written ({error.strerror or error}); name another folder.") from error
        print(f"The voice is in {target}: {', '.join(sorted(path.name for path in target.iterdir()))}.")

    @in_words
    def push(self, repo_id: str, consent: str, public: bool = False) -> None:
        """Push the voice to the Hub.

        Args:
            repo_id: owner/name.
            consent: whose voice it is and that they agree, in a sentence.
            public: whether everybody may see a new repository.

        Raises: CellStopped: if it can't be pushed.
        """
        from tortoise_hf.hub.publish import push_run

        find_token()
        self._export_dir()
        changes = {"repo_id": repo_id, "consent": consent, "private": False if public else None}
        with bars_of_the_hub():
            pushed = push_run(self.run_dir, changes)
        print(f"{'Pushed' if pushed.changed else 'Already up to date'}: {pushed.url}")

    @in_words
    def speak(self, text: str, preset: str = "fast", preview: bool = False, seed: int = 0) -> Speech:
        """Say something; the last line of a cell shows a player.

        Raises: CellStopped: if the run has no export yet, or a model is missing.
        """
        from tortoise_hf.notebook import show
        from tortoise_hf.voice import Voice

        self._export_dir()
        if self._voice is None or (not preview and self._voice_is_preview):
            with bars_of_the_hub():
                self._voice, self._voice_is_preview = Voice.from_pretrained(self.run_dir, preview=preview), preview
        panel, done = show.Panel(), {"codes": 0, "diffusion": 0}

        def count(stage: str, more: int) -> None:
            done[stage] = done.get(stage, 0) + more
            panel.show(show.text(", ".join(f"{name}: {number}" for name, number in done.items() if number)))

        speech = self._voice.speak(text, preset=preset, preview=preview, seed=seed, progress=count)
        panel.show(show.text(f"{speech.seconds:.1f} s of speech{', a rough preview' if preview else ''}"))
        return speech

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _plan_path(self) -> Path:
        return self.settings_path.with_suffix(".plan.json")

    def _run(self, script: str, arguments: list[str], look: Callable[[Program], Any]) -> Program:
        """Run a script to its end; Interrupt stops it."""
        from tortoise_hf.notebook.settings import where_to_write

        self.config()
        arguments = ["--config", str(self.settings_path), *arguments]
        command, env = launch_command(find_script(script), arguments, max(1, len(self.gpus)), self.precision)
        program = Program(command, env, self.log_path)
        with interrupts_go_to(program):
            code = program.wait(lambda: look(program))
        if program.interrupts == 1:
            raise CellStopped("Stopped; everything is saved. Run this cell again, and it goes on from there.")
        if program.interrupts:
            raise CellStopped("Left at once. Run this cell again, and it goes on from the last save.")
        if code != 0:
            said = where_to_write(program.error())
            raise CellStopped(said or f"{program.tail()}\nAll of it is in {self.log_path}.")
        return program

    def _bring_back(self) -> None:
        """The run from where it was kept, if that is newer than what is here."""
        if self.keep_dir is not None and self.keep_dir.is_dir():
            from tortoise_hf.notebook.keep import restore_copy

            step = restore_copy(self.keep_dir, self.run_dir, self.cache_dir)
            if step is not None:
                print(f"Brought back step {step:,} from {self.keep_dir}.")
        if self.keep_on_hub and _holds_checkpoints(self.keep_on_hub):
            from tortoise_hf.hub.checkpoints import SCHEME, fetch_run

            cfg = self.config()
            with bars_of_the_hub():
                fetch_run(cfg.having({"training.resume": f"{SCHEME}{self.keep_on_hub}"}))

    def _forget_voice(self) -> None:
        """Give memory back that the training needs."""
        if self._voice is None:
            return
        import torch

        self._voice = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _export_dir(self) -> Path:
        from tortoise_hf.export import is_export
        from tortoise_hf.run import EXPORT_DIR

        if not is_export(self.run_dir / EXPORT_DIR):
            raise UserError(f"{self.run_dir} holds no finished voice yet; train to the end first.")
        return self.run_dir / EXPORT_DIR


def _holds_checkpoints(repo_id: str) -> bool:
    from huggingface_hub import HfApi

    from tortoise_hf.hub.client import CHECKPOINT_MARKER, explain

    try:
        return HfApi().file_exists(repo_id, CHECKPOINT_MARKER)
    except Exception as error:  # whatever the client's HTTP library raises
        raise UserError(explain(error, repo_id)) from error
