"""scripts/evaluate.py: from arguments to figures, with tiny random voices."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil

import pytest
import soundfile
import torch
from chain_models import make_tiny_chain, make_tiny_voice
from conftest import REPOSITORY, SENTENCES
from conftest import make_tiny_voice as make_tiny_recordings

from tortoise_hf.config import DataConfig
from tortoise_hf.evaluation.report import metric_rows
from tortoise_hf.latents import VoiceLatents, save_latents


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("script_evaluate", REPOSITORY / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A voice with a speaker, a run of it, recordings, other people's recordings, the chain."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_tiny_chain(folder / "chain")
    make_tiny_voice(folder / "voice", SENTENCES)
    generator = torch.Generator().manual_seed(3)
    latents = VoiceLatents(torch.randn(1, 32, generator=generator), torch.randn(1, 64, generator=generator))
    save_latents(latents, folder / "voice" / "latents.safetensors")
    recordings = make_tiny_recordings(folder / "recordings", 12)
    for name in ("ann", "bob"):
        shutil.copytree(make_tiny_recordings(folder / "more" / name, 6) / "wavs", folder / "others" / name)
    run = folder / "run"
    shutil.copytree(folder / "voice", run / "export")
    (run / "export" / "latents.safetensors").unlink()
    (run / "run.json").write_text(
        json.dumps({"config": {"data": dataclasses.asdict(DataConfig(root=str(recordings)))}})
    )
    (run / "train_clips.json").write_text(json.dumps({f"clip-{number}": "0" for number in range(8)}))
    return folder


@pytest.fixture
def evaluate(main, places, tmp_path, monkeypatch):
    """Calls evaluate.py quickly, without a recogniser; returns what it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        quick = ["--device", "cpu", "--max_codes", "12", "--num_texts", "3", "--asr", "none"]
        main([str(argument) for argument in (*quick, *arguments)])

    return call


def read(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def test_a_run_and_another_voice(evaluate, places, capsys):
    """A preview of the run's export, which has no speaker, and of a voice that brings one along."""
    where = ("--run", places / "run", "--voice", places / "voice", "--preview")
    evaluate(*where, "--voices", places / "others")
    out, err = capsys.readouterr()
    content = read(places / "run" / "evaluation")
    columns = {column["name"]: column for column in content["columns"]}
    assert list(columns) == ["recordings", "resynthesised", "run", "voice"]
    assert "doesn't say who speaks" in err
    assert "are taken instead" in err

    texts = [spoken["text"] for spoken in columns["run"]["spoken"]]
    assert len(texts) == 3
    assert texts == [spoken["text"] for spoken in columns["recordings"]["spoken"]]  # those of the held-out clips
    for name in ("resynthesised", "run", "voice"):
        for spoken in columns[name]["spoken"]:
            assert soundfile.info(places / "run" / "evaluation" / spoken["wav"]).samplerate == 22_050
            assert spoken["expected_seconds"] > 0
    assert all(spoken["seconds"] < 0.558 for spoken in columns["run"]["spoken"])
    assert columns["recordings"]["speaker"] is None  # other channel
    assert columns["resynthesised"]["speaker"]["similarity"] == pytest.approx(1, abs=1e-4)
    assert set(columns["run"]["speaker"]["nearest"]) <= {"the voice's speaker", "ann", "bob"}
    assert 0 <= columns["run"]["ended"] <= 1
    assert columns["recordings"]["ended"] is None
    check = content["checks"]["run"]
    assert list(content["checks"]) == ["run"]  # both voices have the same DVAE
    assert (check["num_voices"], check["learnt_from"]) == (3, "resynthesised")
    assert 0 <= check["speaker_accuracy"] <= 1
    assert "of 3 voices" in out
    assert (places / "run" / "evaluation" / "lengths.png").is_file()
    assert any(row.key == "ended" for row in metric_rows(content, "run"))

    evaluate(*where, "--speaker_measure", "none", "--seed", "1")  # beside the other, not over it
    assert read(places / "run" / "evaluation-2")["columns"][2]["speaker"] is None
    assert read(places / "run" / "evaluation") == content


def test_texts_alone(evaluate, places, tmp_path, capsys):
    """Without recordings there are still the endings and repetitions, and the words if somebody listens."""
    (tmp_path / "texts.txt").write_text("Rain fell.\nHe said yes!\nWhy not, then?\nOne more.\n")
    evaluate("--voice", places / "voice", "--texts", "texts.txt", "--preview", "--out", "new/folder")
    content = read(tmp_path / "new" / "folder")
    assert [column["name"] for column in content["columns"]] == ["voice"]
    assert [spoken["text"] for spoken in content["columns"][0]["spoken"]] == [
        "Rain fell.",
        "He said yes!",
        "Why not, then?",
    ]
    assert content["columns"][0]["as_long_as_expected"] is None
    out = capsys.readouterr().out
    assert "no recogniser was named" in out
    assert "no recordings were given" in out


def test_somebody_listens(evaluate, places, tmp_path, capsys):
    grammar = "#JSGF V1.0;\ngrammar tiny;\npublic <said> = rain fell | he said yes;\n"
    (tmp_path / "tiny.jsgf").write_text(grammar)
    (tmp_path / "texts.txt").write_text("Rain fell.\nHe said no!\n")
    listens = ("--asr", "pocketsphinx", "--grammar", "tiny.jsgf", "--texts", "texts.txt")
    evaluate("--voice", places / "voice", "--preview", "--seed", "2", *listens)
    words = read(tmp_path / "evaluation")["columns"][0]["words"]
    assert (words["num_words"], len(words["heard"])) == (5, 2)
    assert set(words["heard"]) <= {"", "rain", "rain fell", "he", "he said", "he said yes"}
    assert (tmp_path / "evaluation" / "word_error_rate.png").is_file()
    out = capsys.readouterr().out
    assert "count as wrong: no." in out
    assert "words wrong (WER)" in out


def test_the_whole_chain(evaluate, places, tmp_path, capsys):
    """Recordings of the same length go through diffusion model and vocoder as sampled codes do."""
    quick = ("--preset", "single_sample", "--num_samples", "2", "--steps", "2", "--num_texts", "2")
    evaluate("--voice", places / "voice", "--data", places / "recordings", "--weights_dir", places / "chain", *quick)
    content = read(tmp_path / "evaluation")
    columns = {column["name"]: column for column in content["columns"]}
    assert set(columns) == {"recordings", "resynthesised", "voice"}
    assert soundfile.info(tmp_path / "evaluation" / columns["resynthesised"]["spoken"][0]["wav"]).samplerate == 24_000
    assert columns["recordings"]["speaker"]["similarity"] == pytest.approx(1, abs=1e-4)
    out = capsys.readouterr().out
    assert "learnt the speaker from recordings as they are" in out
    assert "for want of other voices" in out


def test_two_voices_with_different_codes(evaluate, places, tmp_path):
    """Each is compared with recordings that went through its own DVAE."""
    from tortoise_hf.models.dvae import DVAE, DVAEConfig

    shutil.copytree(places / "voice", tmp_path / "other")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        dvae = DVAE(DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=256, num_resnet_blocks=1))
        dvae.save_pretrained(tmp_path / "other" / "dvae")
    evaluate("--voice", places / "voice", "--voice", "other", "--data", places / "recordings", "--preview")
    content = read(tmp_path / "evaluation")
    names = ["recordings", "resynthesised", "resynthesised by other", "voice", "other"]
    assert [column["name"] for column in content["columns"]] == names
    assert list(content["checks"]) == ["voice", "other"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--voice", "nobody", "--data", "recordings", "--preview"), "neither a folder"),
        (("--voice", "voice", "--data", "nowhere", "--preview"), "no folder or archive"),
        (("--voice", "voice", "--texts", "nowhere.txt", "--preview"), "can't be read"),
        (("--run", "voice", "--preview"), "not the folder of a run"),
        (("--voice", "voice", "--data", "recordings", "--preview", "--out", "recordings"), "is there already"),
        (("--voice", "voice", "--data", "recordings", "--preview", "--asr", "ears"), "no recogniser 'ears'"),
        (("--voice", "voice", "--data", "recordings", "--preview", "--voices", "recordings"), "tell voices apart"),
        (("--voice", "voice", "--data", "recordings", "--preview", "--speaker", "ann"), "no recordings of ann"),
        (("--voice", "voice", "--data", "recordings", "--preset", "best"), "no preset 'best'"),
        (("--voice", "voice"), "say what to speak"),
        (("--data", "recordings"), "say what to evaluate"),
        (("--voice", "voice", "--data", "recordings", "--num_texts", "0"), "at least 1"),
    ],
)
def test_mistakes_are_sentences(evaluate, places, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(places)
    before = sorted(path.name for path in places.iterdir())
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments)
    assert stop.value.code in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in places.iterdir()) == before


def test_help_answers(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--speaker_measure" in capsys.readouterr().out
