"""The benchmarks of training measure what they say, on tiny models."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from conftest import GOLDEN, REPOSITORY, golden_gpt
from safetensors.torch import load_file

from tortoise_hf.models.attention import PACKED_SDPA
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT


@pytest.fixture(autouse=True)
def precision_left_alone():
    """The benchmarks set TF32 for their whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


class TestReferenceStep:
    def test_losses_are_the_forks(self, benchmark):
        golden = load_file(GOLDEN / "gpt.safetensors")
        text_ids = golden["in.text"][:, : int(golden["in.text_lengths"].max())]
        text_loss, mel_loss = benchmark("reference_step").losses(
            golden_gpt(), text_ids, golden["in.mel_codes"], golden["in.cond_mels"]
        )
        assert text_loss.item() == pytest.approx(float(golden["out.fork.loss_text"]), abs=1e-4)
        assert mel_loss.item() == pytest.approx(float(golden["out.fork.loss_mel"]), abs=1e-4)

    def test_micro_batches_are_averaged_and_the_model_is_handed_back(self, benchmark, tmp_path):
        reference = benchmark("reference_step")
        synthetic, sizes = benchmark("synthetic"), benchmark("sizes")
        synthetic.write_raw_folder(tmp_path / "raw", synthetic.ljspeech_shapes(4))
        clips = [
            (path, torch.arange(3, 20 + place)) for place, path in enumerate(sorted((tmp_path / "raw/wavs").iterdir()))
        ]
        batch = reference.collate([reference.RawClips(clips)[place] for place in range(4)])
        assert batch.waveforms.shape == (4, 255_995)
        assert batch.conditioning.shape == (4, 2, 44_000)
        gpt_config, dvae_config = copy.deepcopy(sizes.SIZES["tiny"])
        gpt_config.dropout = 0.0
        torch.manual_seed(0)
        gpt = TortoiseGPT(gpt_config)
        optimizer = reference.build_optimizer(gpt)
        step = reference.ReferenceStep(gpt, DVAE(dvae_config), synthetic.random_norms(), optimizer, torch.device("cpu"))
        activation = gpt.gpt.h[0].mlp.act
        with step.in_charge():
            assert gpt.gpt.h[0].gradient_checkpointing
            assert gpt.gpt.config._attn_implementation == "eager"
            whole = step.micro_batch(batch)
            expected = gpt.mel_head.weight.grad.clone()
            gpt.zero_grad()
            for _ in range(2):
                step.micro_batch(batch, num_micro_batches=2)
        torch.testing.assert_close(gpt.mel_head.weight.grad, expected)
        assert whole.isfinite()
        before = gpt.mel_head.weight.detach().clone()
        step.update()
        assert not torch.equal(gpt.mel_head.weight, before)
        assert gpt.gpt.h[0].mlp.act is activation
        assert not gpt.gpt.h[0].gradient_checkpointing
        assert gpt.config._attn_implementation == "sdpa"
        assert gpt.gpt.config._attn_implementation == PACKED_SDPA


def test_operations_are_those_that_torch_counts(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    flops = benchmark("flops")
    config = GPTConfig(num_layers=2, hidden_size=64, num_heads=4, num_mel_codes=96, num_conditioning_layers=2)
    gpt = TortoiseGPT(config)
    gpt.set_attn_implementation("eager")
    mels, text, mel = torch.randn(2, 80, 40), torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 30, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        gpt(text, mel, conditioning_mel=mels.unsqueeze(0))
    mine = flops.stack(config, 43) + flops.heads(config, 12, 30) + 2 * flops.conditioning(config, 40)
    # torch counts all of the square that attention's causal half is cut from, and nothing of the CPU's fused kernel.
    unseen = 2 * (4 * 64 * 40**2 + 4 * 64 * 40)
    assert counter.get_total_flops() in range(int(0.97 * (mine - unseen)), int(1.2 * mine))
    dvae_config = DVAEConfig(hidden_size=16, codebook_dim=16, num_codes=32)
    with FlopCounterMode(display=False) as counter:
        DVAE(dvae_config).encode(torch.randn(1, 80, 160))
    assert flops.dvae_encoding(dvae_config, 40) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_lengths_are_ljspeechs(benchmark):
    synthetic = benchmark("synthetic")
    shapes = synthetic.ljspeech_shapes(synthetic.LJSPEECH_CLIPS)
    assert shapes.seconds / synthetic.LJSPEECH_CLIPS == pytest.approx(6.57, abs=0.05)
    assert 1.1 <= shapes.num_samples.min() / 22_050 < 1.5
    assert 10 < shapes.num_samples.max() / 22_050 <= 10.1
    assert shapes.num_text_ids.mean() / synthetic.TEXT_IDS_PER_CHARACTER == pytest.approx(100, abs=2)


def test_variants_take_turns(benchmark):
    measuring, seen = benchmark("measuring"), []
    variants = {name: (lambda name=name: seen.append(name)) for name in ("a", "b")}
    costs = measuring.alternate(variants, 2, torch.device("cpu"))
    assert seen == ["a", "b"] * 3
    assert [len(each) for each in costs.values()] == [2, 2]
    rows = [{"x": 1.0, "y": "one"}, {"x": 12345.0, "y": "two"}, {"z": 3}]
    assert measuring.table(rows) == "| x | y |\n| --- | --- |\n| 1 | one |\n| 12,345 | two |\n\n| z |\n| --- |\n| 3 |"


TRAIN_STEP = ["--size", "tiny", "--clips", "40", "--micro_batches", "2", "--micro_batch_size", "4", "--repeats", "1"]


def test_train_step(benchmark, tmp_path):
    quick = [*TRAIN_STEP, "--warm_up", "0", "--batch_size", "16", "--conditioning_group", "1", "4", "--device", "cpu"]
    result = benchmark("train_step").main([*quick, "--epoch", "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    epoch = result["epochs"][result["rows"][2]["variant"]]
    assert epoch["steps"] == 3
    assert epoch["seconds"] > 0
    reference, alone, shared = result["rows"]
    assert reference["variant"] == "reference"
    assert reference["times_reference"] == 1
    assert reference["padding_share"] > 0.2 > shared["padding_share"] == alone["padding_share"] >= 0
    for row in result["rows"]:
        assert row["clips_per_second"] > 0
        assert row["real_tokens_per_second"] > row["clips_per_second"]
        assert 0 < row["utilisation"] < 1
        assert row["peak_gib"] > 0.1
        assert 0 < row["update_seconds"] < row["turn_seconds"]
    assert shared["times_reference"] == pytest.approx(shared["clips_per_second"] / reference["clips_per_second"])
    assert result["environment"]["threads"] >= 1
    assert not {"hostname", "node", "user"} & set(result["environment"])
    assert result["matrix_operations_per_second"]["float32"] > 1e8


def test_packing(benchmark, tmp_path):
    arguments = ["--size", "tiny", "--micro_batch_size", "4", "--repeats", "1", "--device", "cpu"]
    result = benchmark("packing").main([*arguments, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    padded, packed = result["rows"]
    assert padded["positions"] > packed["positions"]
    assert packed["padding_share"] == 0 < padded["padding_share"] < 0.3
    assert padded["mel_loss_in_training"] == pytest.approx(packed["mel_loss_in_training"], rel=1e-5)
    assert result["padded_over_packed"] > 0


@pytest.mark.parametrize("least", [0, 0.02])
def test_profile_step(benchmark, tmp_path, least):
    arguments = [
        "--size",
        "tiny",
        "--micro_batch_size",
        "2",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--least",
        str(least),
    ]
    result = benchmark("profile_step").main([*arguments, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    rows = {row["operation"]: row for row in result["rows"]}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["seconds_per_step"] for row in rows.values()) == pytest.approx(result["seconds_per_step"])
    rest = rows.pop("the rest")
    assert all(row["share"] >= least for row in rows.values())
    if least:
        assert rest["calls_per_step"] > 100
    else:
        assert rest["calls_per_step"] == 0
        assert rows["aten::mm"]["calls_per_step"] > 10


def test_prepare(benchmark, tmp_path):
    arguments = ["--size", "tiny", "--clips", "3", "--seconds", "0.8", "--batches", "2", "--device", "cpu"]
    result = benchmark("prepare").main([*arguments, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    assert result["audio_seconds"] == pytest.approx(2.4)
    seconds = {row["stage"]: row["seconds"] for row in result["rows"]}
    assert {"read", "mel", "DVAE, batches of 2", "write", "cold", "warm"} <= seconds.keys()
    for row in result["rows"]:
        assert row["audio_seconds_per_second"] == pytest.approx(2.4 / row["seconds"])


def test_scaling(benchmark, tmp_path):
    arguments = ["--clips", "24", "--batches", "2", "--batch_size", "4", "--device", "cpu"]
    result = benchmark("scaling").main([*arguments, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    (row,) = result["rows"]
    assert row["what"] == "24 clips"
    assert row["stored_mib"] > 1
    assert row["clips_fetched_per_second"] > 0
    assert row["own_memory_mib"] > 50
    assert 0 <= row["padding_share"] < 0.3


def test_end_to_end(benchmark, tmp_path, tiny_base, tiny_voice, monkeypatch):
    monkeypatch.setenv("TORTOISE_HF_CACHE", str(tmp_path / "untouched"))
    arguments = ["--root", str(tiny_voice(6)), "--base", str(tiny_base), "--epochs", "1", "--batch_size", "4"]
    arguments += ["--conditioning_group", "1", "2"]
    result = benchmark("end_to_end").main([*arguments, "--device", "cpu", "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    packages, reference, ours, shared = result["rows"]
    assert [row["what"] for row in result["rows"]] == [
        "packages", "reference, 1 epoch", "ours, 1 epoch", "ours, 1 epoch, conditioning shared by 2",
    ]  # fmt: skip
    assert all(row["computing_seconds"] > 0 for row in result["rows"])
    assert packages["times_reference"] == reference["times_reference"] == 1
    assert shared["times_reference"] == pytest.approx(reference["seconds"] / shared["seconds"])
    assert ours["times_reference"] == pytest.approx(reference["seconds"] / ours["seconds"])
    assert not (tmp_path / "untouched").exists()


def test_small_cards(benchmark, tmp_path):
    arguments = ["--recipes", "lora", "t4", "--size", "tiny", "--micro_batches", "1", "--device", "cpu"]
    result = benchmark("small_cards").main([*arguments, "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    lora, full = result["rows"]
    assert (lora["recipe"], lora["mixed_precision"], lora["clips_at_once"], lora["fits"]) == ("lora", "fp16", 2, True)
    assert (full["recipe"], full["clips_at_once"], full["optimizer"]) == ("t4", 16, "adamw")
    assert lora["trained"] < full["trained"]
    assert lora["positions"] == full["positions"] == 455  # of a clip of 11.6 s with 200 text ids
    assert lora["peak_gib"] > lora["computed_gib"] > 0


def test_all_rows_of_a_gpu_fit_into_nine_minutes():
    seconds = re.findall(
        r"^    row (\d+) \w+ (\w+\.py)", (REPOSITORY / "benchmarks/gpu_all.sh").read_text(), re.MULTILINE
    )
    assert sum(int(share) for share, _ in seconds) <= 540
    assert {script for _, script in seconds} > {"train_step.py", "small_cards.py", "prepare.py"}
