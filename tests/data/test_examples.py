"""What a clip and a text are encoded to: the reference's codes, silence after the clip, nothing of its neighbours."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import soundfile
import torch
from voice_maker import MEL_NORMS, load_dvae, refuse_to_load, sentence, tokenizer, waveform, write_clip

from tortoise_hf.audio import SAMPLE_RATE, LogMel, num_codes, silent_frame
from tortoise_hf.data.examples import (
    CLIP_FEATURES,
    TEXT_FEATURES,
    ClipEncoder,
    EncodedClip,
    TextEncoder,
    clip_key,
    join_examples,
)
from tortoise_hf.data.store import ShardStore

LIMIT = 255_995


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return ClipEncoder(load_dvae, MEL_NORMS, min_samples=13_230, max_samples=LIMIT)


def encode_as_the_reference_trainer_does(samples: torch.Tensor) -> np.ndarray:
    """Codes of the clip padded with zeros to 255 995 samples, the code count of the clip alone."""
    padded = torch.zeros(LIMIT)
    padded[: len(samples)] = samples
    return load_dvae().encode(LogMel(MEL_NORMS)(padded))[0, : len(samples) // 1024 + 1].numpy()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_codes(encoder):
    samples = torch.from_numpy(waveform(100_000))
    found = ClipEncoder(load_dvae, MEL_NORMS, 1, LIMIT, device="cuda").encode(samples)
    load_dvae().cpu()
    expected = encoder.encode(samples)
    assert found.mel_codes.tolist() == expected.mel_codes.tolist()
    np.testing.assert_allclose(found.mel.astype(np.float32), expected.mel.astype(np.float32), atol=5e-3)


# Around multiples of 256 and 1024 and up to the reference's padding itself.
@pytest.mark.parametrize("num_samples", [13_230, 20_479, 20_480, 20_481, 20_735, 44_000, 98_304, 143_325, 240_000])
def test_codes_are_those_of_the_clip_followed_by_silence(encoder, num_samples):
    samples = torch.from_numpy(waveform(num_samples, seed=num_samples))
    codes = encoder.encode(samples).mel_codes
    assert codes.tolist() == encode_as_the_reference_trainer_does(samples).tolist()
    assert len(codes) == num_codes(num_samples)
    assert len(set(codes.tolist())) > 3


@pytest.mark.parametrize("num_samples", [13_230, 20_480, 44_000])
def test_after_its_mel_comes_nothing_but_silence(encoder, num_samples):
    samples = torch.from_numpy(waveform(num_samples, seed=num_samples))
    mel = encoder.encode(samples).mel
    padded = LogMel(MEL_NORMS)(torch.nn.functional.pad(samples, (0, 20_000)))[0].T
    silence = silent_frame(MEL_NORMS)
    torch.testing.assert_close(torch.from_numpy(mel).float(), padded[: len(mel)], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(padded[len(mel) :], silence.expand(len(padded) - len(mel), 80))
    assert mel.dtype == np.float16


@pytest.mark.parametrize("num_samples", [800, 2048, 2049, 44_000])
def test_first_frames_of_a_cut_clip(encoder, num_samples):
    samples = torch.from_numpy(waveform(num_samples, seed=num_samples))
    cuts = encoder.encode(samples).mel_cuts
    assert cuts.shape == (max(1, num_samples // 2048), 2, 80)
    for number, cut in enumerate(cuts):
        rest = torch.nn.functional.pad(samples[number * 2048 :], (0, 4096))
        expected = LogMel(MEL_NORMS)(rest)[0, :, :2].T
        torch.testing.assert_close(torch.from_numpy(cut).float(), expected, atol=1e-3, rtol=1e-3)


def test_limits_are_inclusive_and_give_a_note_instead_of_a_record(encoder, tmp_path):
    for name, num_samples in (("short", 13_229), ("least", 13_230), ("most", LIMIT), ("long", LIMIT + 1)):
        soundfile.write(tmp_path / f"{name}.wav", waveform(num_samples), SAMPLE_RATE)
    names = ["short", "least", "most", "long"]
    records = {record["key"]: record for record in encoder(names, [str(tmp_path / f"{name}.wav") for name in names])}
    assert set(records) == {encoder.skipped_key("short"), "least", "most", encoder.skipped_key("long")}
    assert [record["status"] for record in records.values()] == ["skipped", "ok", "ok", "skipped"]
    assert records["most"]["num_samples"] == LIMIT
    assert len(records["most"]["mel_codes"]) == 250
    assert len(records[encoder.skipped_key("long")]["mel_codes"]) == 0


def test_other_limits_look_at_a_skipped_clip_again(encoder):
    wider = ClipEncoder(load_dvae, MEL_NORMS, min_samples=1000, max_samples=LIMIT)
    assert wider.skipped_key("a") != encoder.skipped_key("a")


def test_a_bad_file_is_recorded_and_one_that_cannot_be_opened_is_not(encoder, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"this is no audio")
    paths = [str(tmp_path / "bad.wav"), str(tmp_path / "gone.wav")]
    (record,) = encoder(["bad", "gone"], paths)
    assert (record["key"], record["status"]) == ("bad", "unreadable")
    assert record["detail"]


def test_the_key_of_a_clip_follows_path_size_and_time(tmp_path):
    path, other = tmp_path / "a.wav", tmp_path / "b.wav"
    write_clip(path, 1.0)
    os.link(path, other)
    key = clip_key(str(path))
    assert clip_key(str(path)) == key != clip_key(str(other))
    os.utime(path, ns=(0, 1))
    assert clip_key(str(path)) != key


def test_the_encoder_travels_without_the_networks(encoder):
    loaded = ClipEncoder(load_dvae, MEL_NORMS, 1, LIMIT)
    loaded.encode(torch.from_numpy(waveform(20_000)))
    assert len(pickle.dumps(loaded)) < 5_000
    # Nothing is loaded before the first clip that has to be encoded.
    assert list(ClipEncoder(refuse_to_load, MEL_NORMS, 1, 2)([], [])) == []


def test_texts_are_cleaned_and_tokenised():
    encode = TextEncoder(tokenizer())
    plain, number, unknown = encode(["a", "b", "c"], ["The  River", "7 rivers", "50% & more"])
    assert plain["cleaned"] == "the river"
    assert plain["text_ids"].tolist() == tokenizer().encode("the river")
    assert number["cleaned"] == "seven rivers"
    assert plain["unknown"] == ""
    assert unknown["unknown"] == "% &"


def test_examples_are_put_together_in_order_without_copies(tmp_path):
    texts, clips = ShardStore(tmp_path / "t", TEXT_FEATURES), ShardStore(tmp_path / "c", CLIP_FEATURES)
    texts.write(TextEncoder(tokenizer())(list("abc"), [sentence(i) for i in range(3)]))

    def clip(key: str, value: int) -> dict:
        mel = np.full((value, 80), value, np.float16)
        codes = np.full(value, value, np.int16)
        clip = EncodedClip(mel, mel[:2], codes)._asdict()
        return {"key": key, "status": "ok", "detail": "", "num_samples": value, **clip}

    clips.write([clip("a", 1), clip("unused", 9)])
    clips.write([clip("c", 3), clip("b", 2)])
    examples = join_examples({"clip_id": ["C", "A", "B"]}, texts.find("cab"), clips.find("cab"))
    assert examples["clip_id"][:] == ["C", "A", "B"]
    assert examples["mel_codes"][:] == [[3, 3, 3], [1], [2, 2]]
    assert examples["num_samples"][:] == [3, 1, 2]
    assert examples[1]["text_ids"] == tokenizer().encode(sentence(0))
    assert len(examples[0]["mel"]) == 3 * 80
    assert len(examples.cache_files) == 2
