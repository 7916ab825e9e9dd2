"""The notebook, run as a user runs it: interrupted, its machine lost, run again to the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY, make_tiny_voice

from tortoise_hf.notebook.project import Project
from tortoise_hf.notebook.settings import GUIDE_FIELDS

PATH = REPOSITORY / "notebooks" / "finetune.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}
FIELD = re.compile(r"^(\w+) = (.*?)  # @param (.*)$", flags=re.MULTILINE)


def filled(**fields):
    """The notebook with other values in its form fields."""
    notebook = nbformat.read(PATH, as_version=4)
    left = dict(fields)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = FIELD.sub(
                lambda match: f"{match[1]} = {left.pop(match[1])!r}" if match[1] in left else match[0], cell.source
            )
    assert not left, f"no such field: {left}"
    return notebook


def without_install(notebook):
    """The notebook without the cell that installs; once is enough for a test."""
    notebook.cells = [cell for cell in notebook.cells if cell.id not in ("install", "install-text")]
    return notebook


def shown(notebook, cell_id):
    """All that a cell shows, as one text."""
    (cell,) = [cell for cell in notebook.cells if cell.get("id") == cell_id]
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts += output.traceback
        else:
            parts += [value for kind, value in output.data.items() if kind.startswith("text/")]
    return "\n".join(parts)


def story(notebook):
    """What all cells show, for whoever reads why a test failed."""
    return "\n".join(
        f"--- {name}: {shown(notebook, name)[-1500:]}" for name in CODE if name in {cell.id for cell in notebook.cells}
    )


def execute(notebook, folder, when=None):
    """Run a notebook in a folder; `when` (condition, action with the kernel's process id) may interfere.

    Returns: the error that ended it, or None.
    """
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    done = threading.Event()

    def interfere():
        condition, action = when
        while not done.wait(0.1):
            if condition():
                return action(client.km.provisioner.pid)
        return None

    watcher = threading.Thread(target=interfere if when else lambda: None)
    watcher.start()
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        return error
    finally:
        done.set()
        watcher.join()
    return None


def log_steps(run):
    path = run / "log.jsonl"
    entries = (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    )
    return [entry["step"] for entry in entries if "loss" in entry]


# --- the file --------------------------------------------------------------------------------------------------------


def test_it_is_clean():
    nbformat.validate(NOTEBOOK)
    assert all(not cell.outputs and cell.execution_count is None for cell in NOTEBOOK.cells if cell.cell_type == "code")
    ids = [cell.id for cell in NOTEBOOK.cells]
    assert len(set(ids)) == len(ids)
    assert [name.removesuffix("-text") for name in ids[1::2]] == ids[2::2]  # a section is a sentence and a cell
    assert PATH.read_text(encoding="utf-8").endswith("}\n")
    for source in CODE.values():
        calls = [line for line in source.splitlines() if "voice_maker." in line or "project." in line]
        assert len(calls) <= 2, "cells only call the package"


def test_every_field_of_the_guide_is_there():
    fields = {name for source in CODE.values() for name, _, _ in FIELD.findall(source)}
    guide = {"Experiment_Name", "Dataset_Training_Path", "ValidationDataset_Training_Path", "Fp16", *GUIDE_FIELDS}
    assert guide <= fields
    asked_for = set(re.findall(r"^\| `(\w+)`", (REPOSITORY / "docs" / "from-the-colab-guide.md").read_text(), re.M))
    assert {name for name in asked_for if name[0].isupper()} <= guide
    for name in [*guide, *fields]:
        assert sum(source.count(name) > 1 for source in CODE.values()) >= 1, f"{name} is a field that nothing reads"


def test_the_documentation_names_every_field():
    page = (REPOSITORY / "docs" / "notebook.md").read_text(encoding="utf-8")
    fields = {name for source in CODE.values() for name, _, _ in FIELD.findall(source)}
    assert [name for name in sorted(fields) if f"`{name}`" not in page] == []


@pytest.fixture
def base(tiny_base, tmp_path):
    """A base with weights, as the released one has them."""
    import torch

    from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

    shutil.copytree(tiny_base, tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TortoiseGPT(GPTConfig.from_pretrained(tiny_base)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_interrupted_lost_and_run_again(base, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("TORTOISE_HF_CACHE", str(tmp_path / "cache"))
    make_tiny_voice(tmp_path / "recordings", 24)
    lost, kept = tmp_path / "lost", tmp_path / "drive"
    given = {
        "Dataset_Training_Path": str(tmp_path / "recordings"),
        "Base": str(base),
        "Keep_In": str(kept),
        "TrainingRate": 1e-3,
        "TrainBS": "8",
        "PrintFreq": "2",
        "Data_Settings": "data.conditioning_seconds: 0.5",
        "Keep_On_Hub": "me/my-run",
        "Other_Settings": "samples.num_texts: 2",
    }

    # A long run, interrupted while it trains.
    first = without_install(filled(**given, Max_Steps="100000"))
    run = lost / "runs" / "my_voice"
    lost.mkdir()
    error = execute(first, lost, (lambda: len(log_steps(run)) > 2, lambda pid: os.kill(pid, signal.SIGINT)))
    assert error is not None
    assert error.ename == "CellStopped", story(first)
    assert "Stopped; everything is saved. Run this cell again" in shown(first, "train"), story(first)
    assert "Traceback" not in shown(first, "train")
    assert "0 clips" not in shown(first, "recordings")
    assert shown(first, "recordings").count("<audio") == 4
    assert "set by you" in shown(first, "settings")
    (checkpoint,) = [path.name for path in run.glob("checkpoint-*")]
    step = int(checkpoint.split("-")[1])
    assert step >= 4
    assert f"Step {step:,} is kept in" in shown(first, "train")

    # The machine is gone; on another one the same cells go on from the copy, to the end.
    shutil.rmtree(lost)
    third = str(tmp_path / "third")
    Project("my_voice", given["Dataset_Training_Path"], base=str(base), keep_on_hub="me/my-run", folder=third)
    assert (tmp_path / "third" / "my_voice" / checkpoint / "model.safetensors").is_file(), "or from the Hub"
    found = tmp_path / "found"
    found.mkdir()
    settings = given | {"Max_Steps": str(step + 4), "Export_To": str(tmp_path / "exports"), "Preview": True}
    second = filled(**settings, Repository="me/my-voice", Consent="Nobody's: tones and noise.", Text="Hello.")
    assert execute(second, found) is None, story(second)
    assert f"Brought back step {step:,}" in shown(second, "recordings")
    said = (found / "runs" / "my_voice.log").read_text()
    assert "Encoding clips" not in said, "the encoded clips were kept, too"
    assert f"Done: {step + 4} of {step + 4} steps" in shown(second, "train")
    assert "data:image/png" in shown(second, "train")
    assert shown(second, "train").count("<audio") >= 4, "samples"
    steps = log_steps(found / "runs" / "my_voice")
    assert steps[0] == 1
    assert sorted(set(steps)) == steps
    assert steps[-1] == step + 4
    assert (tmp_path / "exports" / "my_voice" / "model.safetensors").is_file()
    assert "Pushed: " in shown(second, "push")
    assert len(shown(second, "push").splitlines()) == 1, "no bars line after line"
    assert "model.safetensors" in hub.repository("me/my-voice").files()
    assert "data:audio/wav" in shown(second, "speak")
    assert f"checkpoint-{step + 4}" in {path.name for path in (kept / "my_voice").iterdir()}


def test_a_mistake_ends_in_a_sentence(tmp_path):
    notebook = without_install(filled(Dataset_Training_Path=str(tmp_path / "nowhere")))
    error = execute(notebook, tmp_path)
    assert error is not None
    *_, sentence, hint = shown(notebook, "recordings").splitlines()
    assert sentence.startswith("error: data.root: there is no folder or archive")
    assert hint == "In this notebook: data.root is the field Dataset_Training_Path."
    assert "Traceback" not in shown(notebook, "recordings")
    assert not shown(notebook, "plan"), "cells behind it are not run"
    assert Path(tmp_path / "runs" / "my_voice.log").is_file()
