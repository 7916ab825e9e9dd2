"""The base as it lies in the repository, which must speak, and the script that puts it together and stores it."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy

from tortoise_hf.audio import SAMPLES_PER_CODE, LogMel, load_mel_norms, load_waveform, num_codes
from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.pretrained import load_dvae, load_gpt, resolve_base
from tortoise_hf.text import TextTokenizer, clean_text

REPOSITORY = Path(__file__).resolve().parents[2]
VOICE = REPOSITORY / "examples" / "demo_voice"
BASE = REPOSITORY / "examples" / "demo_base"
NUM_CLIPS = 12


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(REPOSITORY / "scripts" / "make_demo_base.py"))


@pytest.fixture(scope="module")
def clips():
    """(waveform, text) of some clips of the demo voice, which the base has never heard."""
    rows = [line.split("|") for line in (VOICE / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    return [(load_waveform(VOICE / "wavs" / f"{row[0]}.flac"), row[1]) for row in rows[:NUM_CLIPS]]


@pytest.fixture(scope="module")
def models():
    """GPT and DVAE of the base, the way a run loads them."""
    files = resolve_base(ModelConfig(base=str(BASE)))
    return load_gpt(files, False, 0).eval(), load_dvae(files)


@pytest.fixture(scope="module")
def mels_and_codes(clips, models):
    """(80, F) normalised mel and (C,) codes of each clip, each in front of silence and cut to its own length."""
    log_mel = LogMel(load_mel_norms(BASE / "mel_norms.safetensors"))
    found = []
    for waveform, _ in clips:
        kept = num_codes(len(waveform))
        padded = torch.nn.functional.pad(waveform, (0, (kept + 8) * SAMPLES_PER_CODE - len(waveform)))
        mel = log_mel(padded[None])
        found.append((mel[0, :, : 4 * kept], models[1].encode(mel)[0, :kept]))
    return found


def test_sizes_fit_and_the_folder_is_small():
    config = GPTConfig.from_pretrained(BASE)
    assert config.num_text_tokens == TextTokenizer.from_file(BASE / "tokenizer.json").vocab_size
    assert config.num_mel_codes == DVAE.from_pretrained(BASE / "dvae").config.num_codes
    assert (config.max_text_tokens, config.max_mel_tokens, config.num_mel_bins) == (402, 604, 80)
    assert 4_000_000 < sum(parameter.numel() for parameter in TortoiseGPT(config).parameters()) < 8_000_000
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 14_000_000


def test_weights_are_half_precision_in_the_file_and_full_in_a_run(models):
    for path in (BASE / "model.safetensors", BASE / "dvae" / "model.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}, path  # noqa: SIM118
    assert {weight.dtype for model in models for weight in model.state_dict().values()} == {torch.float32}


def test_codes_of_a_voice_it_never_heard_give_its_mel_back(mels_and_codes, models):
    mel = torch.cat([mel for mel, _ in mels_and_codes], dim=1)
    decoded = torch.cat([models[1].decode(codes[None])[0] for _, codes in mels_and_codes], dim=1)
    explained = 1 - (decoded - mel).square().sum() / (mel - mel.mean(1, keepdim=True)).square().sum()
    assert explained > 0.5
    assert len(torch.cat([codes for _, codes in mels_and_codes]).unique()) > 60


@torch.no_grad()
def test_the_gpt_expects_the_codes_of_the_text_it_is_given_in_their_order(clips, mels_and_codes, models):
    """All losses are in nats per code; knowing nothing costs ln 514 = 6.24, and being sure of something else more."""
    gpt, tokenizer = models[0], TextTokenizer.from_file(BASE / "tokenizer.json")

    def loss(text: str, reference: torch.Tensor, codes: torch.Tensor) -> float:
        text_row = torch.tensor([[gpt.config.start_text_id, *tokenizer.encode(text, clean_text), 0, 0]])
        mel_row = torch.cat([torch.tensor([gpt.config.start_mel_id]), codes])[None]
        targets = torch.cat([codes, torch.tensor([gpt.config.stop_mel_id])])
        logits = gpt(text_row, mel_row, conditioning_mel=reference[None]).mel_logits[0]
        return float(cross_entropy(logits, targets))

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randperm(gpt.config.num_mel_codes, generator=generator)
    own, other, renumbered, reordered = [], [], [], []
    for index, (_, codes) in enumerate(mels_and_codes):
        reference, others_text = mels_and_codes[index - 1][0], clips[index - 1][1]
        own.append(loss(clips[index][1], reference, codes))
        other.append(loss(others_text, reference, codes))
        renumbered.append(loss(clips[index][1], reference, numbers[codes]))
        reordered.append(loss(clips[index][1], reference, codes[torch.randperm(len(codes), generator=generator)]))
    expected = sum(own) / NUM_CLIPS
    # Of a speaker it never heard: held-out clips of those it was trained on cost 2.15.
    assert expected < 6.1
    assert expected < sum(other) / NUM_CLIPS - 0.9
    assert expected < sum(renumbered) / NUM_CLIPS - 4, "another DVAE's codes"
    assert expected < sum(reordered) / NUM_CLIPS - 3


def test_start_puts_a_base_together_that_trains_from_scratch(script, tmp_path):
    for folder in ("first", "second"):
        script["main"](["start", "--corpus", str(VOICE), "--dvae", str(BASE), "--output", str(tmp_path / folder)])
    files = resolve_base(ModelConfig(base=str(tmp_path / "first"), from_scratch=True))
    model = load_gpt(files, True, 0)
    assert model.config.num_mel_codes == load_dvae(files).config.num_codes
    assert model.config.num_text_tokens == TextTokenizer.from_file(files.tokenizer).vocab_size
    for name in ("config.json", "tokenizer.json", "mel_norms.safetensors", "dvae/model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_start_names_what_is_missing_and_overwrites_only_when_told(script, tmp_path):
    start, there = script["start"], tmp_path / "there"
    with pytest.raises(UserError, match=r"holds no mel_norms\.safetensors.*train_dvae"):
        start(VOICE, tmp_path, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    there.mkdir()
    (there / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        start(VOICE, BASE, there)
    start(VOICE, BASE, there, overwrite=True)
    assert (there / "mine.txt").read_text() == "mine"


def test_ship_stores_a_runs_export_in_half_precision(script, tmp_path):
    export = tmp_path / "run" / "export"
    shutil.copytree(BASE / "dvae", export / "dvae")
    for name in ("tokenizer.json", "mel_norms.safetensors"):
        shutil.copy(BASE / name, export)
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_conditioning_layers": 1}
    model = TortoiseGPT(GPTConfig(num_text_tokens=40, num_mel_codes=16, **sizes))
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        script["ship"](tmp_path / "run", tmp_path / "shipped")
    model.save_pretrained(export)
    script["ship"](tmp_path / "run", tmp_path / "shipped")
    with safe_open(tmp_path / "shipped" / "model.safetensors", "pt") as file:
        for key, weight in model.state_dict().items():
            assert torch.equal(file.get_tensor(key), weight.half()), key
    assert json.loads((tmp_path / "shipped" / "config.json").read_text())["num_mel_codes"] == 16
    assert resolve_base(ModelConfig(base=str(tmp_path / "shipped"))).dvae_weights.is_relative_to(tmp_path / "shipped")
