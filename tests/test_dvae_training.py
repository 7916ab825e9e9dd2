"""A tiny DVAE learns, goes on where it stopped, and is the same on two processes; what it leaves is a base's DVAE."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.utils import DistributedType
from faults.harness import run
from safetensors.torch import load_file, save_file
from scripts.test_prepare_script import call

from tortoise_hf.audio import SAMPLE_RATE, load_mel_norms, load_waveform
from tortoise_hf.cli import load_config
from tortoise_hf.data.examples import ClipEncoder
from tortoise_hf.dvae_config import DVAERunConfig
from tortoise_hf.dvae_evaluation import reconstruction_loss, round_to_half, save_dvae
from tortoise_hf.dvae_run import choose_mel_norms
from tortoise_hf.dvae_training import DVAETrainer
from tortoise_hf.errors import UserError
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.pretrained import BaseFiles, load_dvae

SETTINGS = {
    "model.hidden_size": 16, "model.codebook_dim": 8, "model.num_codes": 24, "model.num_resnet_blocks": 1,
    "training.max_steps": 60, "training.codebook_start_step": 20, "training.batch_size": 4,
    "training.piece_codes": 12, "training.warmup_steps": 5, "training.learning_rate": 3e-3,
    "training.revival_steps": 10, "training.logging_steps": 10, "training.eval_steps": 30, "training.save_steps": 20,
    "training.num_samples": 1, "training.half": "true", "data.min_eval_clips": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def voice(tmp_path_factory) -> Path:
    """Ten clips of four sounds in changing order: what codes are for."""
    folder = tmp_path_factory.mktemp("dvae") / "voice"
    (folder / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    time = np.arange(4096) / SAMPLE_RATE
    sounds = [
        sum(np.sin(2 * np.pi * pitch * k * time) * 0.8**k for k in range(1, 12)) for pitch in (130, 220, 350, 600)
    ]
    for number in range(10):
        waveform = np.concatenate([0.08 * sounds[sound] for sound in rng.integers(0, 4, 4 + number)])
        soundfile.write(folder / "wavs" / f"clip-{number}.wav", waveform, SAMPLE_RATE)
    (folder / "metadata.csv").write_text("".join(f"clip-{n}|Number {chr(97 + n)}.\n" for n in range(10)))
    return folder


def flags(voice: Path, output: Path, **settings) -> list[str]:
    """Flags of a tiny run; `training__max_steps=3` sets one setting."""
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    own = {"data.root": voice, "data.cache_dir": voice.parent / "cache", "training.output_dir": output}
    return [str(word) for key, value in (SETTINGS | own | settings).items() for word in (f"--{key}", value)]


def train(*argv: str) -> None:
    call("train_dvae", list(argv))


@pytest.fixture(scope="module")
def finished(voice, tmp_path_factory) -> Path:
    """Folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(*flags(voice, folder))
    return folder


def log_of(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "steps_per_second"} for entry in entries]


def test_it_learns_and_the_gradient_reaches_the_encoder(finished):
    log = log_of(finished)
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert losses[60] < 0.4 * losses[1]
    evaluations = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    assert set(evaluations) == {30, 60}
    assert evaluations[60]["eval_explained"] > 0.2
    assert evaluations[60]["eval_perplexity"] > 4
    assert 4 < evaluations[60]["eval_codes_used"] <= 24
    trained = load_file(finished / "checkpoint-60" / "model.safetensors")
    torch.manual_seed(1234)
    begun = DVAE(DVAE.from_pretrained(finished / "checkpoint-60").config).state_dict()
    encoder = [key for key in begun if key.startswith("encoder")]
    assert [key for key in encoder if torch.equal(begun[key], trained[key])] == []


def test_what_it_leaves_is_a_bases_dvae_in_half_precision(finished, voice):
    files = BaseFiles(
        gpt_weights=None, gpt_config=None, gpt_tokenizer=None, tokenizer=None,
        mel_norms=finished / "mel_norms.safetensors",
        dvae_weights=finished / "dvae" / "model.safetensors", dvae_config=finished / "dvae" / "config.json",
    )  # fmt: skip
    stored = load_file(files.dvae_weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    dvae = load_dvae(files)
    assert {tensor.dtype for tensor in dvae.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor.half(), stored[key]) for key, tensor in dvae.state_dict().items())
    assert all(torch.equal(tensor, stored[key].float()) for key, tensor in dvae.state_dict().items())
    # transformers' own loader computes with the same numbers.
    other = DVAE.from_pretrained(finished / "dvae")
    waveform = load_waveform(voice / "wavs" / "clip-0.wav")
    norms = load_mel_norms(files.mel_norms)
    codes = [ClipEncoder(model, norms, 1, 1 << 20).encode(waveform).mel_codes.tolist() for model in (dvae, other)]
    assert codes[0] == codes[1]
    assert len(set(codes[0])) > 1


def test_metrics_and_samples_are_there(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["step"] in (30, 60)
    assert metrics["clips"] == "held out"
    assert metrics["num_train_clips"] + metrics["num_eval_clips"] == 10
    assert metrics["bytes"] == (finished / "dvae" / "model.safetensors").stat().st_size
    assert metrics["settings"]["training"]["half"] is True
    assert "padding" not in metrics["settings"]["data"]
    mel, codes = sorted((finished / "samples").iterdir(), reverse=True)
    assert (mel.name.split("-")[-1], codes.name.split("-")[-1]) == ("mel.wav", "codes.wav")
    sounds = [soundfile.read(path)[0] for path in (mel, codes)]
    assert len(sounds[0]) == len(sounds[1]) > 10_000
    assert min(abs(sound).max() for sound in sounds) > 0.02


def test_a_finished_run_is_left_alone(finished, voice, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(*flags(voice, finished))
    assert "holds a finished DVAE" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(finished, voice, tmp_path, capsys, monkeypatch):
    step = DVAETrainer._step

    def interrupted_step(self, meter):
        step(self, meter)
        if self.state.global_step == 34:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(DVAETrainer, "_step", interrupted_step)
    with pytest.raises(SystemExit) as stop:
        train(*flags(voice, tmp_path / "run"))
    assert stop.value.code == 130
    assert (tmp_path / "run" / "checkpoint-35").is_dir()
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.undo()
    train(*flags(voice, tmp_path / "run"))
    assert "Going on from" in capsys.readouterr().out
    whole, resumed = (load_file(folder / "dvae" / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def script_in_process(argv: list[str]) -> int:
    call("train_dvae", argv)
    return 0


def test_two_processes_learn_what_one_does(finished, voice, tmp_path):
    argv = flags(voice, tmp_path / "two")
    assert run(tmp_path / "out", script_in_process, argv, num_processes=2) == [0, 0]
    one, two = log_of(finished), log_of(tmp_path / "two")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    # Sums in another order: equal to rounding until that tips a code.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert two[2]["loss"] == pytest.approx(one[2]["loss"], rel=1e-2)
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=0.2)


def test_norms_that_are_given_are_used(voice, tmp_path):
    save_file({"mel_norms": torch.linspace(-3, -4, 80)}, tmp_path / "norms.safetensors")
    cfg = load_config(
        flags(voice, tmp_path / "run", model__mel_norms=tmp_path / "norms.safetensors"), "x", DVAERunConfig
    )
    assert torch.equal(choose_mel_norms(cfg, None), torch.linspace(-3, -4, 80))


def test_loud_mistakes_count_more_than_those_in_silence():
    loud, silent = torch.zeros(1, 80, 1), torch.full((1, 80, 1), -11.5)
    assert reconstruction_loss(loud + 0.5, loud) > 5 * reconstruction_loss(silent + 0.5, silent) > 0
    assert reconstruction_loss(loud, loud) == 0


def test_rounding_keeps_codes_whatever_was_counted(tmp_path):
    dvae = DVAE(DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=16, num_resnet_blocks=1)).eval()
    dvae.codebook.cluster_size.fill_(1e6)  # beyond float16
    round_to_half(dvae)
    save_dvae(dvae, tmp_path, half=True)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model.safetensors").values())
    mel = torch.randn(1, 80, 40)
    assert torch.equal(DVAE.from_pretrained(tmp_path).encode(mel), dvae.encode(mel))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"training__max_steps": 20}, "training.codebook_start_step must lie between 0 and training.max_steps 20"),
        ({"model__num_codes": 1}, "model.num_codes must lie between 2 and 32768, got 1"),
        ({"data__padding": "mask"}, "data.padding is not a setting"),
        ({"training__lerning_rate": 1}, "did you mean training.learning_rate?"),
        ({"data__root": "/nowhere"}, "there is no folder or archive /nowhere"),
        ({"model__mel_norms": "/nowhere.safetensors"}, "/nowhere.safetensors: there is no such file"),
    ],
)
def test_wrong_settings_end_in_one_sentence(voice, tmp_path, capsys, settings, sentence):
    with pytest.raises(SystemExit) as stop:
        train(*flags(voice, tmp_path / "run", **settings))
    assert stop.value.code in (1, 2)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_things_in_it_is_refused(voice, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        train(*flags(voice, tmp_path))
    assert "so it is not the folder of a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_does_not_become_another_half_way(voice, tmp_path, capsys):
    started = flags(voice, tmp_path / "run")
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"config": load_config(started, "x", DVAERunConfig).to_dict(), "clips": "another"}
    (folder / "run.json").write_text(json.dumps(record))
    for argv, sentence in (
        (flags(voice, folder, training__seed=7), "was begun with training.seed 1234, and now it is 7"),
        (started, "was begun with other training clips"),
    ):
        with pytest.raises(SystemExit):
            train(*argv)
        assert sentence in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text()) == record


class _Launched:
    """What an accelerator tells of how the run was launched."""

    def __init__(self, num_processes: int, kind: str = "NO") -> None:
        self.num_processes, self.distributed_type = num_processes, DistributedType[kind]


@pytest.mark.parametrize(
    ("launched", "sentence"),
    [
        (_Launched(2, "FSDP"), "too small for; take accelerate_config.yaml"),
        (_Launched(8), "training.batch_size is 4, fewer pieces than the 8 processes"),
    ],
)
def test_launches_it_cannot_serve_are_refused(voice, tmp_path, launched, sentence):
    cfg = load_config(flags(voice, tmp_path / "run"), "x", DVAERunConfig)
    with pytest.raises(UserError, match=sentence):
        DVAETrainer(cfg, launched, None, None, None)
