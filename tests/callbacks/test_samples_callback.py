"""A run that speaks on the way trains as one that doesn't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from sample_maker import make_files, make_samples
from test_loop import run_training
from transformers import TrainerCallback

from tortoise_hf.callbacks import samples as module
from tortoise_hf.callbacks.samples import SamplesCallback
from tortoise_hf.sample_folder import load_samples, spoken_steps

TIMING = {"clips_per_second", "tokens_per_second", "eta_seconds"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_base):
    return make_files(tmp_path_factory.mktemp("samples"), tiny_base)


@pytest.fixture
def run(parts, tmp_path, monkeypatch):
    """Trains in a folder of tmp_path with samples, or without."""
    monkeypatch.setattr(module, "FREE_SECONDS", 1e9)  # however busy the machine is

    def train(name, *, speak=True, extra=(), writer=None, **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        samples, cfg = make_samples(folder, *parts, training__eval_steps=3, training__save_steps=2)
        callbacks = [SamplesCallback(Accelerator(cpu=True), samples, writer)] if speak else []
        state, model = run_training(cfg, num_clips=9, max_steps=7, extra=[*callbacks, *extra], **options)
        log = [{key: value for key, value in entry.items() if key not in TIMING} for entry in state.log_history]
        return SimpleNamespace(
            folder=folder / "run", samples=samples, log=log, weights=model.state_dict(), random=torch.get_rng_state()
        )

    return train


def assert_same_end(one, two):
    assert one.log == two.log
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)
    assert torch.equal(one.random, two.random)


def sounds(run):
    return {path.relative_to(run.folder).as_posix(): path.read_bytes() for path in run.folder.glob("samples/*/*.wav")}


def test_it_speaks_at_every_evaluation_and_training_does_not_notice(run, capsys):
    silent = run("silent", speak=False)
    assert not (silent.folder / "samples").exists()
    heard = {}

    class Writer:
        def add_audio(self, tag, waveform, step, sample_rate):
            heard[tag, step] = (len(waveform), sample_rate)

    spoken = run("spoken", writer=Writer())
    assert_same_end(silent, spoken)
    folder = spoken.folder / "samples"
    assert spoken_steps(folder) == [0, 3, 6, 7]
    for sample in load_samples(spoken.folder):
        info = soundfile.info(sample.path)
        assert (info.samplerate, info.channels, info.subtype) == (22_050, 1, "PCM_16")
        assert info.frames >= 768
        assert sample.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        if sample.step is not None:
            assert heard[f"samples/{sample.number}", sample.step] == (info.frames, 22_050)
    assert [(sample.number, sample.step) for sample in load_samples(spoken.folder)] == [
        (1, None), (1, 0), (1, 3), (1, 6), (1, 7), (2, 0), (2, 3), (2, 6), (2, 7)
    ]  # fmt: skip
    before, after = ((folder / step / "1.wav").read_bytes() for step in ("step-000000", "step-000007"))
    assert before != after
    assert (folder / "index.html").is_file()
    assert f"{folder / 'index.html'} shows and plays them" in capsys.readouterr().out


def test_a_killed_run_goes_on_without_saying_anything_twice(run):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", extra=[Kill()])
    folder = whole.folder.parents[1] / "broken" / "run" / "samples"
    assert spoken_steps(folder) == [0, 3]
    times = {step: (folder / step / "1.wav").stat().st_mtime_ns for step in ("step-000000", "step-000003")}
    # What a kill in the middle of writing leaves, and samples of a future that isn't this run's any more.
    (folder / ".step-000006.tmp").mkdir()
    (folder / "step-000006").mkdir()
    (folder / "samples.json").write_text("[]")
    resumed = run("broken", resume=True)
    assert_same_end(whole, resumed)
    assert sounds(resumed) == sounds(whole)
    assert {step: (folder / step / "1.wav").stat().st_mtime_ns for step in times} == times
    assert not list(folder.glob(".step*"))
    assert not (folder / "samples.json").exists()


def test_a_failure_is_said_once_and_hurts_nothing(run, monkeypatch, capsys):
    silent = run("silent", speak=False)

    def fail(*_):
        torch.rand(3)
        raise RuntimeError("no room left\nand more")

    monkeypatch.setattr("tortoise_hf.samples.Chain.codes", fail)
    assert_same_end(silent, run("spoken"))
    out = capsys.readouterr().out
    assert out.count("Warning") == 1
    assert "samples of step 0 couldn't be made (RuntimeError: no room left). The run goes on without" in out


def test_evaluations_are_passed_over_until_there_is_time(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    spoken = []

    def speak(model, step):
        spoken.append(step)
        clock.now += 30.0
        return []

    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    accelerator = SimpleNamespace(is_main_process=True, distributed_type=DistributedType.NO)
    samples = SimpleNamespace(speak=speak, show=lambda: None, begin=lambda *_: None, folder=Path("x"))
    callback = SamplesCallback(accelerator, samples)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for step in range(1, 10):
        clock.now += 100.0
        callback.on_evaluate(None, SimpleNamespace(global_step=step), None)
    assert spoken == [0, 3, 6, 9]  # 30 s of work for 300 s in between
    assert capsys.readouterr().out.count("none at step") == 1
    monkeypatch.setattr(module, "FREE_SECONDS", 60.0)
    callback.on_evaluate(None, SimpleNamespace(global_step=10), None)
    assert spoken[-1] == 10


def test_where_weights_are_shared_out_or_another_process_is_main_nothing_is_spoken(capsys):
    samples = SimpleNamespace()  # has nothing that could be called
    for main, kind in ((True, DistributedType.FSDP), (False, DistributedType.MULTI_CPU)):
        callback = SamplesCallback(SimpleNamespace(is_main_process=main, distributed_type=kind), samples)
        callback.on_train_begin(None, SimpleNamespace(global_step=0), None)
        callback.on_evaluate(None, SimpleNamespace(global_step=5), None)
    assert capsys.readouterr().out.count("none of them can speak before the run's end") == 1
