"""tortoise-tts 3.0.0 itself, from PyPI, reads our exports and computes what we compute; and we read what it saves."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_gpt, make_config
from safetensors.torch import load_file, save_file
from speaking import all_clips_in_one_batch, first_position, training_batch
from torch.optim import AdamW

from tortoise_hf.audio import LogMel, load_waveform
from tortoise_hf.config import ModelConfig
from tortoise_hf.export import export_model
from tortoise_hf.models.checkpoint_formats import published_layout, published_state_dict, write_published
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.models.pretrained import load_gpt, load_mel_norms, load_tokenizer, resolve_base
from tortoise_hf.text import TextTokenizer, clean_text, train_tokenizer

# Building the environment counts towards the first test's time.
pytestmark = pytest.mark.timeout(1800)

NUM_CODES = 30
PENALTIES = (1.0, 2.0)


def peer_config(config: GPTConfig) -> dict[str, int]:
    """Our sizes as arguments of the peer's class."""
    return {
        "layers": config.num_layers,
        "model_dim": config.hidden_size,
        "heads": config.num_heads,
        "max_text_tokens": config.max_text_tokens,
        "max_mel_tokens": config.max_mel_tokens,
        "max_conditioning_inputs": config.max_conditioning_inputs,
        "number_text_tokens": config.num_text_tokens,
        "start_text_token": config.start_text_id,
        "number_mel_codes": config.mel_vocabulary,
        "start_mel_token": config.start_mel_id,
        "stop_mel_token": config.stop_mel_id,
    }


@pytest.fixture(scope="module")
def inputs():
    golden = load_file(GOLDEN / "gpt.safetensors")
    return {
        "conditioning_mel": golden["in.cond_mels"],
        "text": golden["in.text"],
        "text_lengths": golden["in.text_lengths"],
        "mel_codes": golden["in.mel_codes"],
        "wav_lengths": golden["in.wav_lengths"],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What a base needs besides the GPT."""
    folder = tmp_path_factory.mktemp("peer_base")
    train_tokenizer(["the thin thing then there when"] * 5, 60).save(folder / "tokenizer.json")
    save_file({"mel_norms": -torch.linspace(2, 9, 80)}, folder / "mel_norms.safetensors")
    DVAE(DVAEConfig(hidden_size=8, codebook_dim=8, num_codes=256, num_resnet_blocks=1)).save_pretrained(folder / "dvae")
    golden_gpt().config.save_pretrained(folder)
    return folder


def reference_rows(config, inputs):
    """Input rows and targets as the peer's forward pass builds them: all padding is STOP and counts."""
    text = F.pad(inputs["text"][:, : inputs["text_lengths"].max()], (0, 1), value=config.stop_text_id)
    codes = inputs["mel_codes"][:, : inputs["wav_lengths"].max() // 1024].clone()
    for row, samples in zip(codes, inputs["wav_lengths"], strict=True):
        row[samples // 1024 + 1 :] = config.stop_mel_id
    codes = F.pad(codes, (0, 1), value=config.stop_mel_id)
    return (
        F.pad(text, (1, 0), value=config.start_text_id),
        F.pad(codes, (1, 0), value=config.start_mel_id),
        F.pad(text, (0, 1), value=config.stop_text_id),
        F.pad(codes, (0, 1), value=config.stop_mel_id),
    )


def mean_losses(output, text_targets, mel_targets):
    """Mean cross-entropy of both heads over all positions, in nats."""
    return (
        F.cross_entropy(output.text_logits.flatten(0, 1), text_targets.flatten()),
        F.cross_entropy(output.mel_logits.flatten(0, 1), mel_targets.flatten()),
    )


def train_steps(model, inputs, steps, learning_rate=1e-3):
    """A few real optimizer steps on the golden batch; gives the mel loss before and after, in nats."""
    text_inputs, mel_inputs, text_targets, mel_targets = reference_rows(model.config, inputs)
    optimizer = AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        output = model(text_inputs, mel_inputs, conditioning_mel=inputs["conditioning_mel"])
        text_loss, mel_loss = mean_losses(output, text_targets, mel_targets)
        optimizer.zero_grad()
        (0.01 * text_loss + mel_loss).backward()
        optimizer.step()
        losses.append(float(mel_loss.detach()))
    return losses[0], losses[-1]


@torch.no_grad()
def greedy_codes(model, latent, text_ids, num_codes, penalty):
    """The most likely codes one after the other, with the penalty as transformers applies it to the peer's prompt.

    That prompt is made of placeholders with id 1 and START, so code 1 and START are penalised from the beginning.
    """
    config = model.config
    text = F.pad(F.pad(text_ids, (1, 0), value=config.start_text_id), (0, 1), value=config.stop_text_id)
    codes = torch.tensor([[config.start_mel_id]])
    for _ in range(num_codes):
        logits = model(text, codes, conditioning_latent=latent).mel_logits[0, -1]
        seen = torch.unique(torch.cat([torch.tensor([1]), codes[0]]))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        codes = torch.cat([codes, logits.argmax().view(1, 1)], dim=1)
        if codes[0, -1] == config.stop_mel_id:
            break
    return codes[:, 1:]


@pytest.fixture(scope="module")
def trained(base, inputs):
    """A fine-tuned model: the golden one after some steps, taught not to stop early."""
    model = golden_gpt()
    before, after = train_steps(model, inputs, 5)
    assert after < before
    with torch.no_grad():
        model.mel_head.bias[model.config.stop_mel_id] -= 20
    return model


@pytest.fixture(scope="module")
def exports(trained, base, tmp_path_factory):
    """Our exports in all layouts: name -> file."""
    files = resolve_base(ModelConfig(base=str(base), from_scratch=True))
    folder = tmp_path_factory.mktemp("exports")
    paths = {}
    for dtype in ("float32", "float16"):
        for buffers in (True, False):
            name = f"{dtype} {'with' if buffers else 'without'} buffers"
            out = folder / name.replace(" ", "_")
            options = {"dtype": dtype, "attention_buffers": buffers, "base_state": golden_gpt().state_dict()}
            export_model(trained, out, files=files, step=100, summary={}, **options)
            paths[name] = out / "100_gpt.pth"
    return paths


@pytest.fixture(scope="module", params=["4.26.1", "4.29.2", "pinned"])
def layouts(request, peer, trained, exports, tmp_path_factory):
    """What the peer's class wants under a transformers version, and which files it takes."""
    version = peer.peer.transformers if request.param == "pinned" else request.param
    if version != peer.peer.transformers and version not in peer.peer.older:
        pytest.skip(f"transformers {version} has no wheels of its tokenizers for this Python")
    task = {
        "peer_config": peer_config(trained.config),
        "full_size": peer_config(GPTConfig()),
        "files": {name: str(path) for name, path in exports.items()} | {"golden": str(GOLDEN / "100_gpt.pth")},
    }
    _, answer = peer.run("layouts", tmp_path_factory.mktemp("layouts"), transformers=version, **task)
    return version, answer


def test_export_loads_strictly_in_the_layout_each_version_wants(layouts):
    """Up to 4.29 a strict load demands the attention buffers, from 4.30 on it refuses them."""
    version, answer = layouts
    wants_buffers = version in ("4.26.1", "4.29.2")
    for name, error in answer["errors"].items():
        fits = ("without" not in name) == wants_buffers
        assert (error is None) == fits, f"{name}: {error}"
        if error is not None:
            assert ("Missing" if wants_buffers else "Unexpected") in error
            assert "attn.masked_bias" in error
            assert "c_attn" not in error
    assert len(answer["errors"]) == 5


def test_export_loads_completely_the_lenient_way_of_its_api(layouts):
    """tortoise-tts itself passes strict=False: nothing but attention buffers may be left out or unknown."""
    _, answer = layouts
    for name, found in answer["lenient"].items():
        keys = found["missing_keys"] + found["unexpected_keys"]
        assert all(re.search(r"\.attn\.(bias|masked_bias)$", key) for key in keys), name
        assert bool(keys) == (answer["errors"][name] is not None)


def test_full_size_key_table_is_the_peers(layouts):
    version, answer = layouts
    ours = published_layout(GPTConfig(), attention_buffers=version in ("4.26.1", "4.29.2"))
    assert list(answer["table"]) == list(ours)
    for key, (shape, dtype) in answer["table"].items():
        assert tuple(shape) == ours[key][0]
        # 4.29 keeps the causal mask as bool; the published file, made earlier, has uint8.
        mask_of_4_29 = version == "4.29.2" and key.endswith(".attn.bias") and dtype == "torch.bool"
        assert dtype == str(ours[key][1]) or mask_of_4_29


def assert_peer_computes_the_same(peer, folder, model, weights, inputs, late_weights=None):
    model = model.eval()
    task = {
        "peer_config": peer_config(model.config),
        "weights": str(weights),
        "late_weights": str(late_weights or weights),
        "num_codes": NUM_CODES,
        "repetition_penalties": PENALTIES,
    }
    theirs, _ = peer.run("speak", folder, inputs, **task)
    text_inputs, mel_inputs, text_targets, mel_targets = reference_rows(model.config, inputs)
    with torch.no_grad():
        latent = model.encode_conditioning(inputs["conditioning_mel"])
        output = model(text_inputs, mel_inputs, conditioning_latent=latent)
        text_loss, mel_loss = mean_losses(output, text_targets, mel_targets)
        text = F.pad(inputs["text"][:1], (0, 1))
        latents = model.latents(text, inputs["mel_codes"][:1], latent[:1])
    ours = {
        "conditioning_latent": latent,
        "text_logits": output.text_logits.transpose(1, 2),
        "mel_logits": output.mel_logits.transpose(1, 2),
        "loss_text": text_loss,
        "loss_mel": mel_loss,
        "latents": latents,
    }
    for name, tensor in ours.items():
        torch.testing.assert_close(
            theirs[name], tensor, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for penalty in PENALTIES:
        codes = greedy_codes(model, latent[:1], text, NUM_CODES, penalty)
        assert codes.shape == (1, NUM_CODES)
        assert theirs[f"greedy_{penalty}"].tolist() == codes.tolist()
        assert theirs[f"loaded_late_{penalty}"].tolist() == codes.tolist()
    return theirs


def test_peer_computes_our_conditioning_logits_latents_losses_and_codes(peer, trained, exports, inputs, tmp_path):
    files = exports["float32 without buffers"], exports["float32 with buffers"]
    theirs = assert_peer_computes_the_same(peer, tmp_path, trained, files[0], inputs, files[1])
    assert theirs["greedy_1.0"].tolist() != theirs["greedy_2.0"].tolist()  # the penalty was at work


def test_state_dict_saved_by_the_peer_is_fine_tuned_here_and_goes_back(peer, base, inputs, tmp_path):
    model_config = golden_gpt().config
    task = {"peer_config": peer_config(model_config), "seed": 11}
    theirs, answer = peer.run("save", tmp_path / "saved", inputs, **task)
    assert answer["late"] > answer["early"] + 10  # the file saved late really holds duplicates
    models = {}
    for name in ("early", "late"):
        start = tmp_path / name
        start.mkdir()
        for file in ("tokenizer.json", "mel_norms.safetensors", "config.json"):
            (start / file).write_bytes((base / file).read_bytes())
        (start / "dvae").symlink_to(base / "dvae")
        (tmp_path / "saved" / f"{name}.pth").rename(start / "autoregressive.pth")
        files = resolve_base(ModelConfig(base=str(start)))
        models[name] = load_gpt(files)
    early, late = models["early"], models["late"]
    assert all(torch.equal(tensor, late.state_dict()[key]) for key, tensor in early.state_dict().items())

    text_inputs, mel_inputs, *_ = reference_rows(model_config, inputs)
    with torch.no_grad():
        latent = early.encode_conditioning(inputs["conditioning_mel"])
        mel_logits = early(text_inputs, mel_inputs, conditioning_latent=latent).mel_logits
    torch.testing.assert_close(latent, theirs["conditioning_latent"], rtol=0, atol=1e-4)
    torch.testing.assert_close(mel_logits.transpose(1, 2), theirs["mel_logits"], rtol=0, atol=1e-4)

    start_state = {key: tensor.clone() for key, tensor in early.state_dict().items()}
    before, after = train_steps(early, inputs, 60, learning_rate=3e-3)
    assert after < 0.7 * before
    with torch.no_grad():
        early.mel_head.bias[model_config.stop_mel_id] -= 20
    options = {"files": files, "step": 60, "summary": {}, "base_state": start_state, "attention_buffers": False}
    export_model(early, tmp_path / "export", **options)
    assert_peer_computes_the_same(peer, tmp_path / "again", early, tmp_path / "export" / "60_gpt.pth", inputs)


def test_peer_notices_what_a_lenient_load_would_hide(peer, trained, inputs, tmp_path):
    """The trap of a careless buffer pattern: without c_attn.bias a lenient load goes through and computes nonsense."""
    state = published_state_dict(trained.state_dict(), trained.config, attention_buffers=False)
    write_published({key: t for key, t in state.items() if not key.endswith("attn.c_attn.bias")}, tmp_path / "lost.pth")
    task = {"peer_config": peer_config(trained.config), "files": {"lost": str(tmp_path / "lost.pth")}}
    _, answer = peer.run("layouts", tmp_path / "strict", **task)
    assert "gpt.h.1.attn.c_attn.bias" in answer["errors"]["lost"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """10 recordings, no longer than the 6 s of a conditioning clip: rates, lengths, channels and sample types vary."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(3)
    kinds = [
        (22050, 1.0, 1, "PCM_16"),
        (22050, 6.0, 1, "PCM_16"),
        (22050, 3.3, 2, "PCM_16"),
        (22050, 0.7, 1, "FLOAT"),
        (22050, 2.0, 1, "PCM_32"),
        (16000, 2.5, 1, "PCM_16"),
        (24000, 4.1, 1, "PCM_16"),
        (44100, 5.0, 2, "PCM_16"),
        (48000, 1.7, 1, "FLOAT"),
        (8000, 3.0, 1, "PCM_32"),
    ]
    paths = {}
    for index, (rate, seconds, channels, subtype) in enumerate(kinds):
        time = np.arange(int(rate * seconds)) / rate
        tones = [0.3 * np.sin(2 * np.pi * (110 * (1 + index) + 60 * c) * time) for c in range(channels)]
        audio = np.stack(tones, axis=1) + 0.1 * rng.standard_normal((len(time), channels))
        paths[str(index)] = folder / f"{index}.wav"
        soundfile.write(paths[str(index)], np.clip(audio, -0.99, 0.99), rate, subtype=subtype)
    return paths


def texts():
    """50 texts with numbers, money, abbreviations, foreign letters and marks."""
    rows = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["rows"]
    return [row["text"] for row in rows][:50]


def test_tokenizer_and_mel_front_end_are_the_peers(peer, clips, tmp_path):
    """The peer brings the released tokenizer.json and mel_norms.pth along; both are read by our own code here."""
    sentences = texts()
    assert len(sentences) == 50
    task = {"texts": sentences, "clips": {name: str(path) for name, path in clips.items()}}
    theirs, answer = peer.run("front_ends", tmp_path / "run", **task)
    files = _released_front_ends(_peers_files(peer, tmp_path), tmp_path)
    tokenizer = load_tokenizer(files)
    assert tokenizer.vocab_size == 255
    assert [tokenizer.encode(text, clean_text) for text in sentences] == answer["ids"]

    log_mel = LogMel(load_mel_norms(files))
    for name, path in clips.items():
        waveform = load_waveform(path)
        torch.testing.assert_close(waveform, theirs[f"waveform.{name}"][0], rtol=0, atol=1e-6)
        mel = log_mel(F.pad(waveform, (0, 132_300 - len(waveform))))
        assert mel.shape == (1, 80, 517)
        torch.testing.assert_close(mel, theirs[f"mel.{name}"], rtol=0, atol=1e-4)


def _peers_files(peer, tmp_path):
    """A folder with the released tokenizer and norms, out of the peer's package."""
    data = next(peer.peer.python.parents[1].glob("**/site-packages/tortoise/data"))
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("tokenizer.json", "mel_norms.pth"):
        (weights / name).write_bytes((data / name).read_bytes())
    return weights


def _released_front_ends(weights, tmp_path):
    """The released tokenizer and norms through the same door as in a run: pinned hashes, then our readers."""
    base = tmp_path / "base"
    DVAE(DVAEConfig(hidden_size=8, codebook_dim=8, num_codes=8, num_resnet_blocks=1)).save_pretrained(base / "dvae")
    files = resolve_base(ModelConfig(base=str(base), weights_dir=str(weights), from_scratch=True))
    assert "compared with pinned" in files.origins["tokenizer"]
    assert "compared with pinned" in files.origins["mel_norms"]
    return files


def test_training_conditions_on_a_speaker_as_the_peer_speaks_with_one(peer, trained, exports, tiny_voice, tmp_path):
    """The vector in front of a training row is the one tortoise-tts computes from the same recordings."""
    voice = tiny_voice(5)
    # 22 050 Hz, 16 bit: what the peer's wav reader takes
    cfg = make_config(tmp_path, data__root=str(voice), data__cache_dir=str(tmp_path / "cache"))
    found = training_batch(
        all_clips_in_one_batch(cfg), _released_front_ends(_peers_files(peer, tmp_path), tmp_path), trained.config, voice
    )
    task = {
        "peer_config": peer_config(trained.config),
        "weights": str(exports["float32 without buffers"]),
        "groups": [[str(path) for path in clips] for clips in found.conditioning_clips],
    }
    theirs, _ = peer.run("condition", tmp_path / "run", **task)
    ours, _ = first_position(trained, found.batch)
    assert ours.shape == (5, trained.config.hidden_size)
    # Cached mels are float16.
    torch.testing.assert_close(ours, theirs["latents"], rtol=0, atol=0.02)
    spread = (ours[:, None] - ours[None]).abs().amax(-1).max()
    assert spread > 0.1  # other recordings give other vectors


def test_peer_reads_a_tokenizer_of_ours(peer, tmp_path):
    """A new vocabulary in TorToiSe's layout goes into tortoise-tts's tokenizer_vocab_file."""
    trained = train_tokenizer(texts() * 3, 120)
    trained.save(tmp_path / "tokenizer.json")
    task = {"texts": texts(), "clips": {}, "tokenizer": str(tmp_path / "tokenizer.json")}
    _, answer = peer.run("front_ends", tmp_path / "run", **task)
    again = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    assert [again.encode(text, clean_text) for text in texts()] == answer["ids"]
