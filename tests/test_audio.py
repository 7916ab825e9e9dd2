"""Audio: the golden mel spectrograms, every file format, and what a damaged file is called."""

from __future__ import annotations

import io
import json
import math
import struct

import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN, reference_path
from safetensors.torch import load_file, save_file

from tortoise_hf import audio
from tortoise_hf.audio import AudioError, LogMel, LogMel24k, decode_audio, load_mel_norms, load_waveform
from tortoise_hf.errors import UserError

CLOSE = {"atol": 1e-4, "rtol": 0}
RATE = 22_050


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "mel.safetensors")


def tone(seconds=0.5, rate=RATE, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode(samples, kind="WAV", subtype=None, rate=RATE):
    """A real file of those samples, (S,) or (S, channels), as bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def error_of(data):
    with pytest.raises(AudioError) as caught:
        decode_audio(data)
    return caught.value


class TestLogMel:
    def test_golden_without_norms(self, golden):
        torch.testing.assert_close(LogMel()(golden["in.wav22k"]), golden["out.logmel22k_no_norm"], **CLOSE)

    def test_golden_with_synthetic_norms(self, golden):
        mel = LogMel(golden["in.mel_norms_synthetic"])(golden["in.wav22k"])
        torch.testing.assert_close(mel, golden["out.mel22k_synthetic_norms"], **CLOSE)

    def test_golden_with_released_norms(self, golden):
        norms = load_mel_norms(reference_path("mel_norms.json"))
        assert norms.max() < 0
        torch.testing.assert_close(LogMel(norms)(golden["in.wav22k"]), golden["out.mel22k_real_norms"], **CLOSE)

    def test_golden_24k(self, golden):
        wave = audio.resample(golden["in.wav22k"], 22_050, 24_000)
        torch.testing.assert_close(wave, golden["out.wav24k_resampled"], **CLOSE)
        mel = LogMel24k()(golden["out.wav24k_resampled"])
        torch.testing.assert_close(mel, golden["out.mel24k"], **CLOSE)
        normalized = audio.normalize_mel_24k(mel)
        torch.testing.assert_close(normalized, golden["out.mel24k_normalized"], **CLOSE)
        torch.testing.assert_close(audio.denormalize_mel_24k(normalized), mel, atol=1e-5, rtol=0)

    def test_24k_clamps_its_input(self):
        loud = torch.from_numpy(tone(0.2, 24_000)) * 8
        assert torch.equal(LogMel24k()(loud), LogMel24k()(loud.clamp(-1, 1)))
        assert not torch.equal(LogMel()(loud), LogMel()(loud.clamp(-1, 1)))

    @pytest.mark.parametrize(
        "samples, frames, codes", [(13_230, 52, 13), (44_000, 172, 43), (132_300, 517, 130), (255_995, 1000, 250)]
    )
    def test_lengths(self, samples, frames, codes):
        assert LogMel()(torch.zeros(1, samples)).shape == (1, 80, frames)
        assert audio.num_codes(samples) == samples // 1024 + 1 == codes

    def test_codes_of_whole_blocks(self):
        assert [audio.num_codes(samples) for samples in (0, 1023, 1024, 1025, 2048)] == [1, 1, 2, 2, 3]

    def test_silence(self, golden):
        """What a frame of digital silence gives, and so what a short clip is filled up with."""
        norms = golden["in.mel_norms_synthetic"]
        mel = LogMel(norms)(torch.zeros(1, 4096))
        expected = audio.silent_frame(norms)
        torch.testing.assert_close(mel, expected.view(1, 80, 1).expand_as(mel), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(LogMel()(torch.zeros(1, 4096)), torch.full((1, 80, 17), math.log(1e-5)))

    def test_one_waveform_is_a_batch_of_one(self, golden):
        log_mel, wave = LogMel(), golden["in.wav22k"]
        assert torch.equal(log_mel(wave[0]), log_mel(wave[:1]))
        assert torch.allclose(log_mel(wave)[1:], log_mel(wave[1]), atol=1e-6)

    def test_autocast_does_not_change_it(self, golden):
        log_mel = LogMel(golden["in.mel_norms_synthetic"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mel = log_mel(golden["in.wav22k"])
        assert mel.dtype == torch.float32
        assert torch.equal(mel, log_mel(golden["in.wav22k"]))

    def test_shortest_waveform(self):
        assert LogMel()(torch.zeros(1, 513)).shape == (1, 80, 3)
        with pytest.raises(ValueError, match="at least 513 samples, got 512"):
            LogMel()(torch.zeros(1, 512))


class TestDecode:
    @pytest.mark.parametrize(
        "subtype, step",
        [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-24), ("FLOAT", 0), ("DOUBLE", 0)],
    )
    def test_wav_samples_come_back_to_a_step(self, subtype, step):
        samples, rate = decode_audio(encode(tone(), subtype=subtype))
        assert (samples.dtype, samples.shape, rate) == (np.float32, (1, 11_025), RATE)
        assert np.abs(samples[0] - tone()).max() <= step

    def test_integers_are_divided_by_their_full_scale(self):
        values = np.array([0, 1, -1, 12_345, 32_767, -32_768], dtype=np.int16)
        samples, _ = decode_audio(encode(values, subtype="PCM_16"))
        assert samples[0].tolist() == (values / np.float32(32_768)).tolist()

    def test_float_samples_beyond_one_are_kept(self):
        assert decode_audio(encode(tone() * 4, subtype="FLOAT"))[0].max() > 1.9

    @pytest.mark.parametrize("kind, tolerance", [("FLAC", 2**-15), ("OGG", 0.05), ("MP3", 0.05)])
    def test_other_formats(self, kind, tolerance, tmp_path):
        path = tmp_path / f"clip.{kind.lower()}"
        path.write_bytes(encode(tone(), kind))
        samples, rate = decode_audio(path)
        assert (samples.shape, rate) == ((1, 11_025), RATE)
        assert np.abs(samples[0, 2000:-2000] - tone()[2000:-2000]).max() <= tolerance

    def test_path_and_bytes_agree(self, tmp_path):
        (tmp_path / "clip.wav").write_bytes(encode(tone()))
        from_path, from_bytes = decode_audio(str(tmp_path / "clip.wav")), decode_audio(encode(tone()))
        assert np.array_equal(from_path[0], from_bytes[0])

    def test_channels_are_kept_apart(self):
        left, right = tone(hertz=300), tone(hertz=500)
        samples, _ = decode_audio(encode(np.stack([left, right], 1), subtype="FLOAT"))
        assert np.array_equal(samples, np.stack([left, right]))

    def test_metadata_behind_the_samples_is_no_sound(self):
        tagged = encode(tone()) + b"LIST" + struct.pack("<I", 8) + b"INFOabcd"
        assert decode_audio(tagged)[0].shape == (1, 11_025)

    @pytest.mark.parametrize("size", [0, 1000, 10**8, 0xFFFFFFFF])
    def test_wrong_riff_size_costs_no_sample(self, size):
        """That field says nothing about the samples; the data chunk's own size does."""
        data = bytearray(encode(tone()))
        data[4:8] = struct.pack("<I", size)
        assert decode_audio(bytes(data))[0].shape == (1, 11_025)

    @pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
    def test_wav_written_to_a_pipe(self, size):
        """Its writer couldn't know the length."""
        data = bytearray(encode(tone()))
        data[40:44] = struct.pack("<I", size)
        assert decode_audio(bytes(data))[0].shape == (1, 11_025)

    def test_mp3_of_unknown_length(self):
        """Without the frame that counts the frames libsndfile guesses, here far too much; that isn't truncation."""
        sound = np.concatenate([np.zeros(RATE * 4), np.random.default_rng(0).normal(0, 0.3, RATE * 4)])
        data = encode(sound, "MP3")
        first_sound = data.index(data[:2], 64)
        assert b"Xing" in data[:first_sound]
        bare = data[first_sound:]
        with soundfile.SoundFile(io.BytesIO(bare)) as file:
            assert file.frames > sound.size * 1.1
        assert decode_audio(bare)[0].shape[1] == pytest.approx(sound.size, rel=0.02)

    @pytest.mark.parametrize("rate", [22_050, 48_000])
    def test_mp3_of_unknown_length_and_constant_bit_rate(self, rate):
        """The guess is right then, at 48,000 Hz to the sample."""
        sound = np.random.default_rng(0).normal(0, 0.3, rate * 2)
        buffer = io.BytesIO()
        soundfile.write(buffer, sound, rate, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
        data = buffer.getvalue()
        assert b"Info" in data[:200]
        assert sound.size <= decode_audio(data[data.index(data[:2], 64) :])[0].shape[1] < sound.size + 3000

    def test_mp3_that_is_longer_than_guessed(self):
        """libsndfile reads no further than it guesses, here a quarter; that would be a clip without its end."""
        sound = np.concatenate([np.random.default_rng(0).normal(0, 0.3, RATE * 4), np.zeros(RATE * 4)])
        data = encode(sound, "MP3")
        assert decode_audio(data)[0].shape == (1, sound.size)
        error = error_of(data[data.index(data[:2], 64) :])
        assert (error.reason, "doesn't tell its length" in error.detail) == ("unreadable", True)

    def test_flac_written_to_a_pipe(self):
        """Its writer couldn't know the length."""
        data = bytearray(encode(tone(), "FLAC"))
        data[21] &= 0xF0  # the 36 bits of the header that count the samples
        data[22:26] = bytes(4)
        assert decode_audio(bytes(data))[0].shape == (1, 11_025)
        assert error_of(bytes(data[: len(data) // 2])).reason == "unreadable"

    def test_wav_that_can_not_be_searched(self):
        samples, _ = decode_audio(encode(tone(), subtype="GSM610"))
        assert samples.shape[1] == pytest.approx(11_025, abs=640)  # blocks of 320

    def test_longer_than_one_read(self, monkeypatch):
        monkeypatch.setattr(audio, "_READ_FRAMES", 5000)
        for samples in (tone(), tone()[:10_000]):
            assert np.array_equal(decode_audio(encode(samples, subtype="FLOAT"))[0][0], samples)

    def test_tags_in_front_of_an_mp3(self):
        data = encode(tone(), "MP3")
        tag = b"ID3\x03\x00\x00" + bytes([0, 0, 4, 0]) + bytes(512)
        assert decode_audio(tag + data)[0].shape == (1, 11_025)
        assert error_of(tag + data[: len(data) // 2]).reason == "truncated"


class TestBadFiles:
    @pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
    @pytest.mark.parametrize("share", [0.4, 0.9])
    def test_truncated(self, kind, share, tmp_path):
        data = encode(np.random.default_rng(0).normal(0, 0.1, RATE * 3), kind)
        path = tmp_path / f"clip.{kind.lower()}"
        path.write_bytes(data[: int(len(data) * share)])
        error = error_of(path)
        assert error.reason == "truncated", error
        assert str(error).startswith(f"{path}: ")

    def test_truncated_wav_says_what_is_missing(self):
        data = encode(tone())
        assert error_of(data[:-2]).detail == "its header promises 22,050 bytes of samples, 22,048 are there"
        assert error_of(data[:44]).detail == "its header promises 22,050 bytes of samples, 0 are there"

    @pytest.mark.parametrize("length", [1, 11, 20, 36, 40])
    def test_wav_cut_inside_its_header(self, length):
        assert error_of(encode(tone())[:length]).reason == "unreadable"

    @pytest.mark.parametrize("data", [b"x", b"hello, world" * 100, b"<html>" * 50, bytes(5000), b"RIFF" + bytes(60)])
    def test_garbage(self, data):
        error = error_of(data)
        assert error.reason == "unreadable"
        assert "isn't audio that can be decoded" in error.detail
        assert "BytesIO" not in str(error)

    def test_damaged_flac(self):
        data = bytearray(encode(np.random.default_rng(0).normal(0, 0.1, RATE), "FLAC"))
        data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
        assert error_of(bytes(data)).reason in {"truncated", "unreadable"}

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
    def test_damaged_ogg(self, share):
        """The decoder leaves pages with a wrong checksum out, and the clip would be shorter."""
        data = bytearray(encode(np.random.default_rng(0).normal(0, 0.1, RATE * 3), "OGG"))
        data[int(len(data) * share)] ^= 1
        error = error_of(bytes(data))
        assert (error.reason, "is damaged" in error.detail) == ("unreadable", True)

    def test_ogg_without_its_second_page(self):
        data = encode(tone(), "OGG")
        second, third = (data.index(b"OggS", start) for start in (1, data.index(b"OggS", 1) + 1))
        assert error_of(data[:second] + b"x" + data[third:]).detail.startswith(f"is damaged at byte {second}")

    def test_something_behind_the_last_ogg_page(self):
        data = encode(tone(), "OGG")
        assert np.array_equal(decode_audio(data + b"TAG" * 100)[0], decode_audio(data)[0])

    @pytest.mark.parametrize("kind", ["WAV", "FLAC"])
    def test_no_samples(self, kind):
        assert error_of(encode(np.zeros(0, np.float32), kind)).reason == "empty"

    def test_zero_bytes(self, tmp_path):
        (tmp_path / "clip.wav").touch()
        error = error_of(tmp_path / "clip.wav")
        assert (error.reason, error.detail) == ("empty", "the file has 0 bytes")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_samples_that_are_no_numbers(self, value):
        samples = tone()
        samples[100:103] = value
        error = error_of(encode(samples, subtype="FLOAT"))
        assert (error.reason, error.detail) == ("non_finite", "3 samples are NaN or infinite")

    def test_file_that_can_not_be_opened(self, tmp_path):
        error = error_of(tmp_path / "missing.wav")
        assert error.reason == "unreadable"
        assert "No such file" in str(error)
        assert error_of(tmp_path).reason == "unreadable"

    def test_an_audio_error_is_the_users_to_mend(self):
        assert issubclass(AudioError, UserError)


class TestLoadWaveform:
    def test_first_channel_not_the_mean(self):
        left, right = tone(hertz=300), tone(hertz=500)
        wave = load_waveform(encode(np.stack([left, right], 1), subtype="FLOAT"))
        assert (wave.shape, wave.dtype) == ((11_025,), torch.float32)
        assert np.array_equal(wave.numpy(), left)

    @pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
    def test_resampling_keeps_the_tone(self, rate):
        wave = load_waveform(encode(tone(1.0, rate), subtype="FLOAT", rate=rate))
        assert wave.shape == (RATE,)
        middle = slice(2000, -2000)
        assert np.abs(wave.numpy()[middle] - tone(1.0)[middle]).max() < 0.01

    def test_other_target_rate(self):
        assert load_waveform(encode(tone(1.0)), 24_000).shape == (24_000,)

    def test_clamped_after_resampling(self):
        wave = load_waveform(encode(tone(1.0, 44_100) * 4, subtype="FLOAT", rate=44_100))
        assert (wave.min(), wave.max()) == (-1, 1)

    def test_untouched_at_the_right_rate(self):
        quiet = tone() * 0.001
        assert np.array_equal(load_waveform(encode(quiet, subtype="FLOAT")).numpy(), quiet)

    def test_errors_come_through(self):
        with pytest.raises(AudioError, match="0 bytes"):
            load_waveform(b"")

    @pytest.mark.parametrize("rate, shown", [(44_101, "44,101"), (1, "1")])
    def test_unrelated_sample_rate(self, rate, shown):
        """The resampling filter of the first, the result of the second would take gigabytes."""
        with pytest.raises(AudioError, match=f"sample rate of {shown} Hz can't be converted to 22,050 Hz") as caught:
            load_waveform(encode(tone(), rate=rate))
        assert caught.value.reason == "unreadable"


class TestMelNorms:
    def test_three_formats(self, tmp_path):
        norms = -torch.linspace(1.5, 9.5, 80)
        save_file({"mel_norms": norms}, tmp_path / "norms.safetensors")
        torch.save(norms, tmp_path / "norms.pth")
        (tmp_path / "norms.json").write_text(json.dumps(norms.tolist()))
        for kind in ("safetensors", "pth", "json"):
            loaded = load_mel_norms(tmp_path / f"norms.{kind}")
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, norms)

    @pytest.mark.parametrize(
        "norms, found", [([1.0] * 79, "shape"), ([0.0] + [1.0] * 79, "zero"), ([float("nan")] + [1.0] * 79, "NaN")]
    )
    def test_wrong_numbers(self, tmp_path, norms, found):
        torch.save(torch.tensor(norms), tmp_path / "norms.pth")
        with pytest.raises(UserError, match=f"norms.pth: mel norms must be 80 finite .*{found}"):
            load_mel_norms(tmp_path / "norms.pth")

    def test_damaged_or_missing(self, tmp_path):
        for kind in ("safetensors", "pth", "json"):
            (tmp_path / f"norms.{kind}").write_bytes(b"garbage")
            with pytest.raises(UserError, match="can't be read as mel norms"):
                load_mel_norms(tmp_path / f"norms.{kind}")
        with pytest.raises(UserError, match="no such file"):
            load_mel_norms(tmp_path / "none.pth")

    def test_pickled_code_is_not_run(self, tmp_path):
        class Exploit:
            def __reduce__(self):
                return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

        torch.save(Exploit(), tmp_path / "norms.pth")
        with pytest.raises(UserError, match="can't be read"):
            load_mel_norms(tmp_path / "norms.pth")
        assert not (tmp_path / "ran").exists()
