"""The demo base as it lies in the repository: its files fit one another and the voice, and its script makes them."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from tortoise_hf.audio import SAMPLES_PER_CODE, LogMel, load_mel_norms, num_codes
from tortoise_hf.errors import UserError
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.text import TextTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
VOICE = REPOSITORY / "examples" / "demo_voice"
BASE = REPOSITORY / "examples" / "demo_base"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(REPOSITORY / "scripts" / "make_demo_base.py"))


@pytest.fixture(scope="module")
def voice(script):
    waveforms, texts = script["read_voice"](VOICE)
    return waveforms, texts


@pytest.fixture(scope="module")
def made_again(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    script["main"](["--output", str(folder)])
    return folder


def stored_codes(waveforms):
    """Codes of the stored DVAE, each clip in front of silence and cut to its own length."""
    dvae = DVAE.from_pretrained(BASE / "dvae")
    log_mel = LogMel(load_mel_norms(BASE / "mel_norms.safetensors"))
    codes = []
    for waveform in waveforms:
        kept = num_codes(len(waveform))
        padded = torch.nn.functional.pad(waveform, (0, (kept + 8) * SAMPLES_PER_CODE - len(waveform)))
        codes.append(dvae.encode(log_mel(padded[None]))[0, :kept])
    return codes


def test_sizes_of_gpt_tokenizer_and_dvae_fit_and_the_folder_is_small():
    config = GPTConfig.from_pretrained(BASE)
    assert config.num_text_tokens == TextTokenizer.from_file(BASE / "tokenizer.json").vocab_size
    assert config.num_mel_codes == DVAE.from_pretrained(BASE / "dvae").config.num_codes
    assert (config.max_text_tokens, config.max_mel_tokens, config.num_mel_bins) == (402, 604, 80)
    assert sum(parameter.numel() for parameter in TortoiseGPT(config).parameters()) < 2_000_000
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 1_000_000


def test_tokenizer_knows_every_character_of_the_voice_and_uses_its_pieces(voice):
    tokenizer = TextTokenizer.from_file(BASE / "tokenizer.json")
    used = [token_id for text in voice[1] for token_id in tokenizer.encode(text)]
    assert tokenizer.unk_id not in used
    assert len(set(used)) > 0.9 * tokenizer.vocab_size
    assert len(used) < 0.7 * sum(map(len, voice[1]))  # pieces, not letters


def test_mel_norms_are_the_means_of_the_voice(script, voice):
    norms = load_mel_norms(BASE / "mel_norms.safetensors")
    assert norms.shape == (80,)
    assert norms.dtype == torch.float32
    assert norms.max() <= -2
    torch.testing.assert_close(script["measure_mel_norms"](voice[0]), norms, atol=1e-3, rtol=0)


def test_codes_of_the_voice_are_spread_and_tell_sounds_apart(voice):
    waveforms = voice[0]
    codes = stored_codes(waveforms)
    counts = torch.bincount(torch.cat(codes), minlength=128).double()
    share = counts[counts > 0] / counts.sum()
    assert torch.exp(-(share * share.log()).sum()) > 90
    assert (counts > 0).sum() >= 126

    log_mel = LogMel(None)
    frames = []
    for waveform, row in zip(waveforms, codes, strict=True):
        mel = log_mel(waveform[None])[0]
        mel = torch.nn.functional.pad(mel, (0, max(0, 4 * len(row) - mel.shape[1])), mode="replicate")
        frames.append(mel[:, : 4 * len(row)].reshape(80, -1, 4).permute(1, 0, 2).reshape(len(row), -1))
    frames, codes = torch.cat(frames), torch.cat(codes)
    means = torch.zeros(128, frames.shape[1]).index_add_(0, codes, frames) / counts[:, None].clamp(min=1).float()
    explained = 1 - (frames - means[codes]).square().sum() / (frames - frames.mean(0)).square().sum()
    assert explained > 0.5


def test_the_script_makes_the_stored_files(made_again):
    names = {str(path.relative_to(BASE)) for path in BASE.rglob("*") if path.is_file()} - {"README.md"}
    assert names == {str(path.relative_to(made_again)) for path in made_again.rglob("*") if path.is_file()}
    assert (made_again / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    for name in ("config.json", "dvae/config.json"):
        ours, stored = (json.loads((folder / name).read_text()) for folder in (made_again, BASE))
        assert {**ours, "transformers_version": ""} == {**stored, "transformers_version": ""}
    # The codebook is left out: k-means can settle elsewhere after a rounding difference on another processor.
    ours, stored = (DVAE.from_pretrained(folder / "dvae").encoder.state_dict() for folder in (made_again, BASE))
    for name, weights in stored.items():
        torch.testing.assert_close(ours[name], weights, atol=1e-3, rtol=1e-3, msg=name)


def test_a_folder_that_holds_something_is_only_overwritten_when_told(script, made_again):
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        script["main"](["--output", str(made_again)])


def test_a_missing_or_too_small_voice_is_named(script, tmp_path):
    with pytest.raises(UserError, match=r"metadata\.csv is missing"):
        script["main"](["--voice", str(tmp_path), "--output", str(tmp_path / "base")])
    (tmp_path / "wavs").mkdir()
    first = (VOICE / "metadata.csv").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "metadata.csv").write_text(first)
    shutil.copy(VOICE / "wavs" / f"{first.split('|')[0]}.flac", tmp_path / "wavs")
    with pytest.raises(UserError, match="is too small for a base"):
        script["main"](["--voice", str(tmp_path), "--output", str(tmp_path / "base")])
    assert not (tmp_path / "base").exists()


def test_kmeans_finds_the_centres_of_well_separated_heaps(script):
    torch.manual_seed(0)
    heaps = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (heaps[:, None] + 0.1 * torch.randn(4, 50, 2)).reshape(-1, 2)
    centres = script["fit_codebook"](points, 4)
    assert torch.cdist(heaps, centres).min(dim=1).values.max() < 0.1
    assert torch.equal(centres, script["fit_codebook"](points, 4))


def test_perplexity_of_equal_and_of_single_counts(script):
    assert script["perplexity"](torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert script["perplexity"](torch.tensor([0, 7])) == pytest.approx(1)
