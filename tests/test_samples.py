"""What a run lets be heard: the sentences, the folder, the page, and what the voice's card plays of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from conftest import golden_gpt
from datasets import Dataset
from sample_maker import make_files, make_samples

from tortoise_hf.config import SamplesConfig
from tortoise_hf.hub.voice_folder import _take_samples
from tortoise_hf.sample_folder import load_samples, spoken_steps
from tortoise_hf.sample_sentences import choose_sentences


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_base):
    return make_files(tmp_path_factory.mktemp("samples"), tiny_base)


@pytest.fixture
def samples(parts, tmp_path):
    found, _ = make_samples(tmp_path, *parts)
    found.run_dir.mkdir()
    return found


def changed_gpt():
    model = golden_gpt()
    with torch.no_grad():
        model.mel_head.weight.mul_(-1)
    return model


# --- the sentences --------------------------------------------------------------------------------------------------


def clips(*rows):
    columns = {"clip_id": [], "text": [], "num_samples": [], "speaker": [], "audio_path": [], "mel_codes": []}
    for clip_id, text, num_samples, *speaker in rows:
        values = (clip_id, text, num_samples, speaker[0] if speaker else "", f"/x/{clip_id}.wav", [1, 2])
        for key, value in zip(columns, values, strict=True):
            columns[key].append(value)
    return Dataset.from_dict(columns)


TRAIN = clips(("t1", "Trained on.", 22_050), ("t2", "Also trained on.", 44_100))
HELD_OUT = clips(
    ("a", "Far too long.", 220_500), ("b", "Medium.", 66_150), ("c", "MEDIUM. ", 66_150), ("d", "Short.", 22_050),
    ("e", "A bit longer.", 77_175),
)  # fmt: skip


def test_clips_of_medium_length_are_chosen_each_text_once():
    found = choose_sentences(SamplesConfig(num_texts=2), TRAIN, HELD_OUT)
    assert [(one.clip_id, one.text, one.trained, one.seconds) for one in found] == [
        ("b", "Medium.", False, 3.0), ("e", "A bit longer.", False, 3.5)
    ]  # fmt: skip
    everything = choose_sentences(SamplesConfig(num_texts=9), TRAIN, HELD_OUT)
    assert [one.clip_id for one in everything] == ["b", "e", "d", "a"]


def test_of_several_speakers_the_one_with_most_clips_is_asked():
    train = clips(*((f"t{n}", f"Text {n}.", 22_050, speaker) for n, speaker in enumerate("abbb")))
    held_out = clips(("x", "Not hers.", 22_050, "a"), ("y", "Hers.", 66_150, "b"))
    assert [one.clip_id for one in choose_sentences(SamplesConfig(), train, held_out)] == ["y"]
    assert [one.clip_id for one in choose_sentences(SamplesConfig(), train, held_out.select([0]))] == ["x"]


def test_without_held_out_clips_trained_ones_speak_and_say_so():
    found = choose_sentences(SamplesConfig(), TRAIN, clips())
    assert [(one.clip_id, one.trained) for one in found] == [("t1", True), ("t2", True)]


def test_texts_asked_for_find_their_recordings():
    found = choose_sentences(
        SamplesConfig(texts=("Nobody says this.", " also  TRAINED on.", "short.")), TRAIN, HELD_OUT
    )
    assert [(one.text, one.clip_id, one.trained) for one in found] == [
        ("Nobody says this.", None, False), ("Also trained on.", "t2", True), ("Short.", "d", False)
    ]  # fmt: skip
    assert found[0].max_seconds == pytest.approx(3.7)
    assert found[1].max_seconds == 4.0


# --- the folder -----------------------------------------------------------------------------------------------------


def test_other_sentences_put_the_old_samples_aside(samples, capsys):
    samples.begin(golden_gpt(), 0)
    samples.speak(golden_gpt(), 0)
    samples.begin(golden_gpt(), 0)
    assert spoken_steps(samples.folder) == [0]
    samples.sentences = [replace(samples.sentences[0], text="Another one.")]
    samples.begin(golden_gpt(), 0)
    assert spoken_steps(samples.folder) == []
    assert spoken_steps(samples.run_dir / "aside-1-samples") == [0]
    assert "said other sentences; they are now in" in capsys.readouterr().out


def test_the_end_speaks_what_is_missing_and_lists_it_for_the_card(samples, parts, tmp_path):
    samples.begin(golden_gpt(), 0)
    samples.speak(golden_gpt(), 0)
    samples.speak(changed_gpt(), 4)
    samples.finish(changed_gpt(), 6)
    assert spoken_steps(samples.folder) == [0, 4, 6]
    same = [(samples.folder / step / "1.wav").read_bytes() for step in ("step-000004", "step-000006")]
    assert same[0] == same[1]
    first, second = json.loads((samples.folder / "samples.json").read_text())
    assert first == {
        "text": "The kettle is on. Take a.", "tuned": "step-000006/1.wav", "base": "step-000000/1.wav",
        "recording": "recording/1.wav", "preview": True,
    }  # fmt: skip
    assert "recording" not in second
    taken = _take_samples(samples.folder, tmp_path / "voice" / "samples")
    assert [(one.tuned, one.base, one.preview) for one in taken] == [
        (f"samples/step-000006/{n}.wav", f"samples/step-000000/{n}.wav", True) for n in (1, 2)
    ]
    published = {path.relative_to(tmp_path / "voice").as_posix(): path for path in tmp_path.glob("voice/**/*.wav")}
    assert set(published) == {path for one in taken for path in (one.tuned, one.base)}  # and no recording
    assert all(path.read_bytes() == (samples.run_dir / name).read_bytes() for name, path in published.items())


def test_the_start_is_made_again_where_nobody_could_speak_it(parts, tmp_path, monkeypatch):
    """Where processes share the weights out; the base's weights are there to be read at the end."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    early, _ = make_samples(tmp_path / "a", *parts)
    late, _ = make_samples(tmp_path / "b", *parts)
    monkeypatch.setattr("tortoise_hf.samples.load_gpt", lambda *_: golden_gpt())
    early.begin(golden_gpt(), 0)
    early.speak(golden_gpt(), 0)
    late.finish(changed_gpt(), 6)
    assert spoken_steps(late.folder) == [0, 6]
    for name in ("recording/1.wav", "step-000000/1.wav", "step-000000/2.wav"):
        assert (early.folder / name).read_bytes() == (late.folder / name).read_bytes()


def test_a_run_without_a_sound_ends_as_well(samples, monkeypatch, capsys):
    monkeypatch.setattr("tortoise_hf.samples.griffin_lim", lambda *_: torch.full((1024,), float("nan")))
    samples.begin(golden_gpt(), 0)
    samples.speak(golden_gpt(), 0)
    samples.finish(golden_gpt(), 6)
    assert capsys.readouterr().out.count("what the DVAE's decoder makes of codes is no sound") == 1
    assert not (samples.folder / "samples.json").exists()
    assert load_samples(samples.run_dir) == []


def test_speaking_leaves_the_model_and_chance_as_they_were(samples):
    model = golden_gpt(dropout=0.1).train()
    before, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    samples.begin(model, 0)
    assert len(samples.speak(model, 0)) == 2
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert samples.speak(model, 0) == []  # not twice


# --- the page -------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def read_page(samples):
    html = (samples.folder / "index.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(html)
    return html, links


def test_the_page_plays_what_is_there_and_needs_nothing_else(samples):
    samples.begin(golden_gpt(), 0)
    for step in (0, 4, 8, 12):
        samples.speak(golden_gpt() if step == 0 else changed_gpt(), step)
    log = [{"step": step, "eval_loss": loss, "eval_mel_loss": loss} for step, loss in ((0, 5.0), (4, 3.0), (8, 2.0))]
    (samples.run_dir / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    record = {"config": samples.cfg.to_dict(), "num_train_clips": 5, "max_steps": 20}
    (samples.run_dir / "run.json").write_text(json.dumps(record))
    samples.show()
    html, links = read_page(samples)
    assert len([link for link in links.found if link.endswith(".wav")]) == 2 + 2 * 4
    assert all((samples.folder / link).is_file() for link in links.found), links.found
    assert not re.search(r"https?:|//\w|/work|/tmp", html)  # no network, no places of this machine
    text = " ".join(links.text)
    assert "“Why <not> & then?”" in text
    assert "<not>" not in html
    assert "Training: step 8 of 20" in text
    assert "after: step 8" in text  # the lowest eval loss
    assert "5.000 at step 0, 2.000 at step 8" in text
    assert "previews" in text
    assert "location.reload" in html
    samples.finish(changed_gpt(), 4)
    html, links = read_page(samples)
    assert "after: step 4" in " ".join(links.text)  # what was exported
    assert "location.reload" not in html


def test_the_page_says_what_did_not_stop_by_itself(samples):
    endless = golden_gpt()
    with torch.no_grad():
        endless.mel_head.bias[endless.config.stop_mel_id] = -1e4
    samples.begin(golden_gpt(), 0)
    samples.speak(endless, 0)
    with torch.no_grad():
        endless.mel_head.bias[endless.config.stop_mel_id] = 1e4
    samples.speak(endless, 5)
    samples.show()
    said = re.findall(r"<strong>([^<]*): step (\d)</strong>\s*<span[^>]*>([^<]*)<", read_page(samples)[0])
    assert [(label, step) for label, step, _ in said] == [("before", "0"), ("after", "5")] * 2
    assert all(("cut off" in words) == (step == "0") for _, step, words in said)
