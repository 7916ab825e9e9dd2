"""The scripts as a user runs them: real files, real processes, on tiny data."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tortoise_hf.adapter_files import WEIGHTS as ADAPTER
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.sample_folder import load_samples, spoken_steps


@dataclass
class Done:
    """What a call of the script did."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def train(repository, capsys, monkeypatch):
    """Calls scripts/train.py's main in this process, which has the imports behind it."""
    spec = importlib.util.spec_from_file_location("train_script", repository / "scripts" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    monkeypatch.setattr("tortoise_hf.callbacks.samples.FREE_SECONDS", 1e9)  # however busy the machine is

    def call(*arguments, env=None, check=True):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            for key, value in (env or {}).items():
                patch.setenv(key, value)
            returncode = 0
            try:
                script.main(arguments)
            except SystemExit as stop:
                returncode = stop.code
        AcceleratorState._reset_state(reset_partial_state=True)
        done = Done(returncode, *capsys.readouterr())
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return call


def launch(repository, launcher, *arguments, env):
    """Calls the script in processes of its own."""
    done = subprocess.run(
        [*launcher, str(repository / "scripts" / "train.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def tiny_run(base, data, tmp_path, name="run", **settings):
    """Flags of a run of a few steps."""
    values = {
        "data.root": data,
        "data.cache_dir": tmp_path / "cache",
        "data.num_conditioning_clips": 1,
        "data.conditioning_seconds": 0.5,
        "data.min_eval_clips": 2,
        "model.base": base,
        "model.from_scratch": "true",
        "optim.learning_rate": 1e-3,
        "training.output_dir": tmp_path / name,
        "training.max_steps": 3,
        "training.batch_size": 4,
        "training.micro_batch_size": 4,
        "training.logging_steps": 1,
        "training.eval_steps": 2,
        "callbacks.progress": "false",
        "samples.enabled": "false",
    } | {key.replace("__", "."): value for key, value in settings.items()}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[key] for entry in lines if key in entry]


def test_a_run_from_start_to_export(train, tiny_base, tiny_voice, tmp_path):
    flags = tiny_run(tiny_base, tiny_voice(8), tmp_path)
    done = train(*flags)
    folder = tmp_path / "run"
    assert not (folder / "samples").exists()
    assert len(logged(folder, "loss")) == 3
    assert len(logged(folder, "eval_loss")) == 3  # before the first step, at step 2, at the end
    assert TortoiseGPT.from_pretrained(folder / "export").config.num_layers == 1
    assert "kept 8 of 8 clips" in done.stdout
    report = json.loads((folder / "dataset_report.json").read_text())
    assert report["kept"] == 8
    for path in re.findall(r"^  [a-z ]+  (\S+)  ", done.stdout, flags=re.MULTILINE):
        assert os.path.exists(path), path
    assert "Next:" in done.stdout
    # The same command again: nothing to do, and nothing is redone.
    weights = (folder / "export" / "model.safetensors").stat().st_mtime_ns
    again = train(*flags)
    assert "was complete at step 3" in again.stdout
    assert (folder / "export" / "model.safetensors").stat().st_mtime_ns == weights
    # Made longer, it goes on.
    longer = train(*flags, "--training.max_steps", "5")
    assert "Going on from" in longer.stdout
    assert len(logged(folder, "loss")) == 5


@pytest.mark.parametrize("regional", ["true", "false"])
def test_compiled_blocks_keep_their_names(train, tiny_base, tiny_voice, tmp_path, regional):
    """accelerate's own way with --dynamo_backend saves weights under names that nobody finds again."""
    data = tiny_voice(8)
    train(*tiny_run(tiny_base, data, tmp_path, name="plain"))
    env = {"ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": regional}
    done = train(*tiny_run(tiny_base, data, tmp_path, name="compiled"), env=env)
    assert "Compiled in the first steps: blocks of the GPT (eager)." in done.stdout
    for file in ("checkpoint-3/model.safetensors", "export/model.safetensors"):
        plain, compiled = (load_file(tmp_path / name / file) for name in ("plain", "compiled"))
        assert compiled.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=1e-3)
    longer = train(*tiny_run(tiny_base, data, tmp_path, name="plain", training__max_steps=4), env=env)
    assert "Going on from" in longer.stdout


def test_a_run_can_be_heard(train, tiny_base, tiny_voice, tmp_path):
    flags = tiny_run(tiny_base, tiny_voice(8), tmp_path, samples__enabled="true", samples__num_texts=2)
    done = train(*flags)
    folder = tmp_path / "run"
    assert spoken_steps(folder / "samples") == [0, 2, 3]
    assert {(sample.number, sample.step) for sample in load_samples(folder)} == {
        (number, step) for number in (1, 2) for step in (None, 0, 2, 3)
    }
    assert len(list((folder / "conditioning").glob("*.wav"))) == 4
    entries = json.loads((folder / "samples" / "samples.json").read_text())
    best = json.loads((folder / "export" / "export.json").read_text())["step"]
    assert [entry["tuned"] for entry in entries] == [f"step-{best:06d}/{number}.wav" for number in (1, 2)]
    said = re.findall(r"^  (before|after|page) +(\S+)", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in said] == ["before", "after", "page"]
    assert all(os.path.isfile(path) for _, path in said)
    assert "--clips" not in done.stdout  # the run has them
    # The best model's samples are gone: they come from the export, and are the same.
    before = (folder / "samples" / entries[0]["tuned"]).read_bytes()
    shutil.rmtree(folder / "samples" / f"step-{best:06d}")
    shutil.rmtree(folder / "export")
    train(*flags)
    assert (folder / "samples" / entries[0]["tuned"]).read_bytes() == before


def test_an_adapter_from_start_to_export(train, tiny_base, tiny_voice, tmp_path):
    """The first run's voice is the base; 8 bits for the optimizer where bitsandbytes is installed, a line where not."""
    data = tiny_voice(8)
    train(*tiny_run(tiny_base, data, tmp_path, name="base", training__max_steps=1))
    settings = {"model__from_scratch": "false", "lora__rank": 2, "optim__optimizer": "adamw_8bit"}
    settings |= {"samples__enabled": "true", "samples__num_texts": 1}
    done = train(*tiny_run(tmp_path / "base" / "export", data, tmp_path, **settings))
    folder = tmp_path / "run"
    installed = importlib.util.find_spec("bitsandbytes") is not None
    assert ("this run takes adamw" in done.stdout) == (not installed)
    assert "an adapter of rank 2 on the frozen weights of" in done.stdout
    assert spoken_steps(folder / "samples") == [0, 2, 3]
    best = json.loads((folder / "export" / "export.json").read_text())["step"]
    checkpoint = folder / f"checkpoint-{best}"
    adapter = load_file(folder / "export" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in load_file(checkpoint / ADAPTER).items())
    assert not (checkpoint / "model.safetensors").exists()
    base = load_file(tmp_path / "base" / "export" / "model.safetensors")
    whole = load_file(folder / "export" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], whole[name])}
    assert changed == {f"gpt.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


@pytest.mark.parametrize(("num_clips", "batch_size"), [(1, 4), (2, 4), (3, 4)])
def test_very_small_datasets_train_with_a_warning(train, tiny_base, tiny_voice, tmp_path, num_clips, batch_size):
    data = tiny_voice(num_clips)
    flags = tiny_run(tiny_base, data, tmp_path, training__batch_size=batch_size, data__eval_fraction=0)
    done = train(*flags)
    assert "Warning" in done.stdout
    assert len(logged(tmp_path / "run", "loss")) == 3
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("padding", ["mask", "stop"])
def test_both_paddings_train(train, tiny_base, tiny_voice, tmp_path, padding):
    flags = tiny_run(tiny_base, tiny_voice(6), tmp_path, data__padding=padding)
    train(*flags)
    assert all(loss > 0 for loss in logged(tmp_path / "run", "loss"))


def test_bf16_and_fp16_on_a_cpu(train, tiny_base, tiny_voice, tmp_path):
    data = tiny_voice(6)
    losses = {}
    for precision in ("no", "bf16", "fp16"):
        done = train(
            *tiny_run(tiny_base, data, tmp_path, name=precision, samples__enabled="true", samples__num_texts=1),
            env={"ACCELERATE_MIXED_PRECISION": precision},
        )
        losses[precision] = logged(tmp_path / precision, "eval_loss")
        assert f"mixed precision {precision}" in done.stdout
        assert ("fp16 needs a GPU" in done.stdout) == (precision == "fp16")
        assert spoken_steps(tmp_path / precision / "samples") == [0, 2, 3]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)
    assert losses["fp16"] == losses["no"]


def test_two_processes_train_like_one(train, repository, tiny_base, tiny_voice, tmp_path):
    """Unequal clips, a last step smaller than the batch: losses within 1e-4, the same learning rate on every step."""
    data = tiny_voice(11)
    settings = {"training__max_steps": 6, "training__micro_batch_size": 2, "training__batch_size": 4}
    settings |= {"samples__enabled": "true", "samples__num_texts": 1}
    train(*tiny_run(tiny_base, data, tmp_path, name="one", **settings))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = launch(
        repository,
        launcher,
        *tiny_run(tiny_base, data, tmp_path, name="two", **settings),
        env={"ACCELERATE_USE_CPU": "true"},
    )
    assert "Machine: 2 processes on cpu" in done.stdout
    for key in ("loss", "mel_loss", "text_loss", "eval_loss", "grad_norm"):
        one, two = logged(tmp_path / "one", key), logged(tmp_path / "two", key)
        assert len(one) >= 4
        assert two == pytest.approx(one, abs=1e-4), key
    assert logged(tmp_path / "two", "learning_rate") == logged(tmp_path / "one", "learning_rate")
    one = load_file(tmp_path / "one" / "checkpoint-6" / "model.safetensors")
    two = load_file(tmp_path / "two" / "checkpoint-6" / "model.safetensors")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-3
    rng = torch.load(tmp_path / "two" / "checkpoint-6" / "rng.pt", weights_only=True)
    assert len(rng) == 2
    for name in ("one", "two"):
        assert 0 in spoken_steps(tmp_path / name / "samples")
        assert (tmp_path / name / "samples" / "samples.json").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data__root": "/nowhere/recordings"}, "/nowhere/recordings"),
        ({"model__base": "/nowhere/base"}, "/nowhere/base"),
        ({"optim__learning_rate": "fast"}, "optim.learning_rate"),
        ({"optim__lerning_rate": "1"}, "did you mean optim.learning_rate"),
        ({"training__resume": "/nowhere/checkpoint-1"}, "/nowhere/checkpoint-1"),
    ],
)
def test_mistakes_end_in_a_sentence(train, tiny_base, tiny_voice, tmp_path, change, sentence):
    done = train(*tiny_run(tiny_base, tiny_voice(3), tmp_path, **change), check=False)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_usable_ends_in_a_sentence(train, tiny_base, tiny_voice, tmp_path):
    data = tiny_voice(2)
    for path in (data / "wavs").iterdir():
        path.write_bytes(b"not audio")
    done = train(*tiny_run(tiny_base, data, tmp_path), check=False)
    assert done.returncode == 1
    assert "unreadable" in done.stderr
    assert "Traceback" not in done.stderr
