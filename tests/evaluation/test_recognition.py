"""What counts as the same words, how errors are counted, and what the recognisers hear."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import REPOSITORY

from tortoise_hf.audio import load_waveform, resample
from tortoise_hf.errors import UserError
from tortoise_hf.evaluation.recognition import SphinxRecognizer, load_recognizer, spoken_words, word_errors

GRAMMAR = """#JSGF V1.0;
grammar demo;
public <sentence> = the cat is sleeping under the (window | table)
    | my sister never eats butter with (honey | rice)
    | the dog is waiting in the kitchen;
"""
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, words",
    [
        ("I bought 51 cookies for $61.", "i bought fifty one cookies for sixty one dollars"),
        ("The 12:25 train!", "the twelve twenty five train"),
        ("Dr. Brown, Mr. Jones & Mrs. Hall", "doctor brown mister jones and missus hall"),
        ("Dr Brown, Mr Jones and Mrs Hall", "doctor brown mister jones and missus hall"),
        ("“Don’t,” he said — ’tis the twins' well-known joke.", "don't he said tis the twins well known joke"),
        ("OK: 100 % of it…", "okay one hundred percent of it"),
        ("?!", ""),
    ],
)
def test_spelling_is_no_error(text, words):
    assert spoken_words(text) == words


def test_errors_are_counted():
    texts = ["One, two, three, four.", "Five six."]
    found = word_errors(texts, ["one too three", "five six seven"])
    assert (found.substitutions, found.deletions, found.insertions, found.num_words) == (1, 1, 1, 6)
    assert found.wer == pytest.approx(3 / 6)
    assert found.errors == (2, 1)
    assert found.heard == ("one too three", "five six seven")
    assert found.interval == (pytest.approx(2 / 4), pytest.approx(2 / 4))  # both texts are half wrong
    assert found.chance == pytest.approx((4 + 3) / 6)


def test_perfect_and_hopeless():
    texts = ["The cat is sleeping.", "My sister eats rice.", "The dog waits here."]
    perfect = word_errors(texts, [text.upper() for text in texts])
    assert (perfect.wer, perfect.interval) == (0, (0, 0))
    assert perfect.chance > 0.8
    assert word_errors(texts, ["", "", ""]).wer == 1
    assert word_errors(texts[:1], texts[:1]).chance is None


@pytest.fixture(scope="module")
def sphinx(tmp_path_factory):
    path = tmp_path_factory.mktemp("grammar") / "demo.jsgf"
    path.write_text(GRAMMAR)
    return SphinxRecognizer(path)


def clip(number):
    return load_waveform(REPOSITORY / "examples" / "demo_voice" / "wavs" / f"demo-{number:03}.flac")


def test_sphinx_hears_the_demo_voice(sphinx):
    """As the grammar lets it, and every clip as if it were the first."""
    first = sphinx.transcribe(clip(1), 22_050)
    assert first == "the cat is sleeping under the window"
    assert sphinx.transcribe(clip(2), 22_050) == "my sister never eats butter with honey"
    noise = torch.randn(22_050, generator=torch.Generator().manual_seed(0)) / 10
    for nothing in (torch.zeros(22_050), noise):
        assert sphinx.transcribe(nothing, 22_050) == ""
    assert sphinx.transcribe(clip(1), 22_050) == first


@pytest.mark.parametrize(
    ("number", "said"),
    [(20, "the lawyer is sitting next to the window"), (24, "my father is four years old today")],
)
def test_a_sentence_with_an_odd_sound_in_it_is_heard_again(monkeypatch, number, said):
    """An eighth of the clip is something else, backwards: pocketsphinx as it is then loses all of it."""
    waveform, other = (resample(clip(each), 22_050, 16_000) for each in (number, number + 1))
    middle, length = len(waveform) // 2, int(0.12 * len(waveform))
    waveform[middle : middle + length] = other[:length].flip(0)
    grammar = REPOSITORY / "examples" / "demo_voice" / "grammar.jsgf"
    assert SphinxRecognizer(grammar).transcribe(waveform, 16_000) == said
    monkeypatch.setattr("tortoise_hf.evaluation.recognition._WIDE_BEAMS", {})
    assert SphinxRecognizer(grammar).transcribe(waveform, 16_000) == ""


def test_words_that_cannot_be_heard(sphinx):
    assert sphinx.unknown_words(["The cat and the dog!", "My honey."]) == ["and"]


@pytest.mark.parametrize(
    "content, message",
    [
        (GRAMMAR.replace("dog", "zyxtor"), r"no JSGF grammar .* instance: zyxtor\)"),
        ("nothing of the kind", "no JSGF grammar"),
        (None, "can't be read"),
    ],
)
def test_a_grammar_that_is_none(tmp_path, content, message):
    path = tmp_path / "other.jsgf"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recognizer("pocketsphinx", path, CPU)


def test_recognisers_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"me/nothing can't be loaded .* --asr pocketsphinx"):
        load_recognizer("transformers:me/nothing", None, CPU)
    with pytest.raises(UserError, match="no recogniser 'sphinx'"):
        load_recognizer("sphinx", None, CPU)
    with pytest.raises(UserError, match="takes none"):
        load_recognizer("transformers:me/nothing", tmp_path / "grammar.jsgf", CPU)


def test_a_transformers_recogniser(tmp_path):
    """A tiny random one: it writes something that is made of its letters, whatever the sample rate."""
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    letters = ["<pad>", "<unk>", "|", "a", "b", "c"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(tmp_path / "vocab.json").save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(10, 8), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    recognizer = load_recognizer(f"transformers:{tmp_path}", None, CPU)
    heard = recognizer.transcribe(clip(1), 22_050)
    assert set(heard.lower().replace("<unk>", "")) <= set("abc ")
    assert heard
