"""Who speaks in a pushed voice: its clips, and what its own models hear in them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from chain_models import make_tiny_chain, make_tiny_voice
from conftest import SENTENCES, make_config
from hub.voice_maker import CONSENT, make_run
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tortoise_hf.errors import UserError
from tortoise_hf.hub import pull_voice
from tortoise_hf.hub.conditioning import map_gpt, write_clips, write_latents
from tortoise_hf.hub.publish import push_run
from tortoise_hf.latents import diffusion_latent, gpt_latent
from tortoise_hf.models.chain import load_part
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.voice import Voice


def write_wav(path, seconds, rate=22_050):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(round(100 * seconds))
    soundfile.write(path, 0.2 * rng.standard_normal(int(rate * seconds)), rate)


def write_recordings(folder, lengths):
    """A data set of one clip per length in seconds; `lengths` by clip id, which may begin with a speaker."""
    for name, seconds in lengths.items():
        write_wav(folder / "wavs" / f"{name}.wav", seconds)
    (folder / "metadata.csv").write_text("".join(f"{name}|The kettle is on.\n" for name in lengths))
    return folder


def test_a_pushed_voice_brings_what_its_own_gpt_hears(hub, tmp_path, tiny_base):
    """The run was trained without a thought of pushing, so its clips are chosen when it is pushed."""
    root = write_recordings(tmp_path / "recordings", {f"c{n}": seconds for n, seconds in enumerate((1, 7, 2, 8, 3, 9))})
    run = make_run(tmp_path, tiny_base, hub__repo_id="me/voice", hub__consent=CONSENT, data__root=str(root))
    (run / "train_clips.json").write_text(json.dumps(dict.fromkeys(("c1", "c2", "c3", "c4", "c5"), "")))
    push_run(run)
    pulled = pull_voice("me/voice")
    clips = sorted((pulled / "conditioning").iterdir())
    assert [round(soundfile.info(clip).duration) for clip in clips] == [8, 7, 9, 3]
    text = ModelCard.load(pulled / "README.md").text if (pulled / "README.md").is_file() else ""
    text = text or hub.repository("me/voice").files()["README.md"].decode()
    assert "holds 4 reference clips" in text
    assert "`latents.safetensors` what this GPT hears in them." in text

    trained = TortoiseGPT.from_pretrained(run / "export").eval()
    norms = load_file(run / "export" / "mel_norms.safetensors")["mel_norms"]
    heard = gpt_latent(clips, trained, norms)
    stored = load_file(pulled / "latents.safetensors")
    assert set(stored) == {"gpt"}  # no diffusion model is at hand
    assert torch.equal(stored["gpt"], heard)
    assert not torch.equal(heard, gpt_latent(clips, TortoiseGPT(trained.config).eval(), norms))

    # What is stored is taken, and without it the clips are listened to.
    assert torch.equal(Voice.from_pretrained("me/voice", preview=True, device="cpu").latents.gpt, heard)
    mine = shutil.copytree(pulled, tmp_path / "mine")
    save_file({"gpt": heard + 1}, mine / "latents.safetensors")
    assert torch.equal(Voice.from_pretrained(mine, preview=True, device="cpu").latents.gpt, heard + 1)
    (mine / "latents.safetensors").unlink()
    assert torch.equal(Voice.from_pretrained(mine, preview=True, device="cpu").latents.gpt, heard)
    # The same voice again is no commit.
    assert push_run(run).changed is False


def test_places_are_found_from_another_folder(hub, tmp_path, tiny_base, monkeypatch):
    """A relative path looks like a name on the Hub from where it leads nowhere."""
    write_recordings(tmp_path / "sets" / "recordings", {"c0": 2.0})
    monkeypatch.chdir(tmp_path)
    settings = {"hub__repo_id": "me/voice", "hub__consent": CONSENT, "data__root": "sets/recordings"}
    run = make_run(tmp_path, tiny_base, **settings)
    (run / "train_clips.json").write_text(json.dumps({"c0": ""}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    push_run(run)
    files = hub.repository("me/voice").files()
    assert "conditioning/clip-1.wav" in files
    assert json.loads(files["training_summary.json"])["settings"]["data"]["root"] == "recordings"
    assert "datasets" not in ModelCard(files["README.md"].decode()).data.to_dict()
    shutil.rmtree(run / "export")
    assert push_run(run).changed is False  # exported again, from here


def test_the_diffusion_model_is_heard_too_where_it_is_at_hand(tmp_path):
    chain = make_tiny_chain(tmp_path / "chain")
    voice = make_tiny_voice(tmp_path / "voice", SENTENCES)
    write_wav(voice / "conditioning" / "clip-1.wav", 3.0)
    without = shutil.copytree(voice, tmp_path / "without")
    write_latents(voice, lambda: map_gpt(voice), chain)
    write_latents(without, lambda: map_gpt(without))
    expected = diffusion_latent([voice / "conditioning" / "clip-1.wav"], load_part("diffusion", chain / "diffusion"))
    stored, lacking = (load_file(folder / "latents.safetensors") for folder in (voice, without))
    assert torch.equal(stored["diffusion"], expected)
    assert set(lacking) == {"gpt"}
    # What wasn't stored is heard in the clips.
    for folder in (voice, without):
        speaker = Voice.from_pretrained(folder, weights_dir=chain, device="cpu").latents
        assert torch.equal(speaker.gpt, stored["gpt"])
        assert torch.equal(speaker.diffusion, expected)


def test_latents_a_user_stored_are_left_alone(tmp_path):
    voice = make_tiny_voice(tmp_path / "voice", SENTENCES)
    write_wav(voice / "conditioning" / "clip-1.wav", 3.0)
    (voice / "latents.safetensors").write_bytes(b"mine")
    write_latents(voice, lambda: pytest.fail("the GPT is not needed"))
    assert (voice / "latents.safetensors").read_bytes() == b"mine"


def test_clips_are_one_speakers_and_of_the_best_length(tmp_path):
    root = tmp_path / "recordings"
    lengths = {f"a{n}": 2.0 + n for n in range(9)} | {f"b{n}": 8.0 for n in range(3)}
    write_recordings(root, lengths)
    lines = [f"{name}|The kettle is on.|{name[0]}\n" for name in lengths]
    (root / "metadata.csv").write_text("id|text|speaker\n" + "".join(lines))
    cfg = make_config(tmp_path, data__root=str(root), data__speaker_column="speaker").data
    write_clips(cfg, lengths, tmp_path / "run")
    found = sorted((tmp_path / "run" / "conditioning").iterdir())
    assert [round(soundfile.info(clip).duration) for clip in found] == [8, 7, 9, 6]
    before = [clip.read_bytes() for clip in found]
    write_clips(cfg, ["b0"], tmp_path / "run")  # a run that goes on keeps its clips
    assert [clip.read_bytes() for clip in found] == before


def test_recordings_that_cannot_be_read_leave_no_folder(tmp_path):
    root = write_recordings(tmp_path / "recordings", {"c0": 2.0})
    (root / "wavs" / "c0.wav").write_bytes(b"no sound")
    cfg = make_config(tmp_path, data__root=str(root)).data
    with pytest.raises(UserError, match="none of the 1 training clips"):
        write_clips(cfg, ["c0"], tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
