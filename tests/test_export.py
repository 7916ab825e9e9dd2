"""Exports: what is in the folder, that it's read back exactly, and that half or false ones never appear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden_gpt
from safetensors.torch import load_file, save_file

from tortoise_hf import export
from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export import export_model, is_export, run_self_test
from tortoise_hf.models.checkpoint_formats import published_layout, read_gpt_weights
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import load_dvae, load_gpt, load_mel_norms, resolve_base
from tortoise_hf.text import train_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base of one's own around the golden GPT."""
    folder = tmp_path_factory.mktemp("base")
    golden_gpt().save_pretrained(folder)
    train_tokenizer(["the thin thing then there when"] * 5, 60).save(folder / "tokenizer.json")
    save_file({"mel_norms": -torch.linspace(2, 9, 80)}, folder / "mel_norms.safetensors")
    torch.manual_seed(0)
    DVAE(DVAEConfig(hidden_size=8, codebook_dim=8, num_codes=256, num_resnet_blocks=1)).save_pretrained(folder / "dvae")
    return resolve_base(ModelConfig(base=str(folder)))


@pytest.fixture
def model():
    """The golden GPT after a step of training, in training mode."""
    model = golden_gpt()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def do_export(model, out, files, **options):
    options = {"step": 100, "summary": {"eval_loss": 3.5}, "base_state": golden_gpt().state_dict()} | options
    return export_model(model, out, files=files, **options)


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_folder_holds_everything_and_names_it(model, files, tmp_path):
    report = do_export(model, tmp_path / "out", files)
    assert contents(tmp_path / "out") == {
        "config.json",
        "model.safetensors",
        "100_gpt.pth",
        "tokenizer.json",
        "mel_norms.safetensors",
        "dvae/config.json",
        "dvae/model.safetensors",
        "training_summary.json",
        "export.json",
    }
    assert os.listdir(tmp_path) == ["out"]
    stored = json.loads((tmp_path / "out" / "export.json").read_text())
    assert stored["files"] == report.files
    assert stored["self_test"]["passed"] is True
    assert set(report.files) == contents(tmp_path / "out") - {"export.json"}
    assert report.files["100_gpt.pth"]["bytes"] == (tmp_path / "out" / "100_gpt.pth").stat().st_size
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text()) == {"step": 100, "eval_loss": 3.5}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == files.tokenizer.read_bytes()
    assert str(files.tokenizer.parent) not in (tmp_path / "out" / "export.json").read_text()  # no local paths
    assert "100_gpt.pth" in report.summary()
    assert "0.0e+00" in report.summary()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_files_may_be_read_as_the_umask_says(model, files, tmp_path):
    before = os.umask(0o027)
    try:
        do_export(model, tmp_path / "out", files)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o640)


def test_both_weight_files_hold_the_trained_weights(model, files, tmp_path):
    do_export(model, tmp_path, files)
    expected = model.state_dict()
    published = torch.load(tmp_path / "100_gpt.pth", weights_only=True)
    golden = torch.load(GOLDEN / "100_gpt.pth", weights_only=True)
    assert list(published) == list(golden)
    assert len(published) == 78
    assert all((published[key].shape, published[key].dtype) == (golden[key].shape, golden[key].dtype) for key in golden)
    assert torch.equal(published["gpt.h.1.attn.bias"], golden["gpt.h.1.attn.bias"])
    assert all(torch.equal(published[key], tensor) for key, tensor in expected.items())
    loaded = TortoiseGPT.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_model_goes_on_training_as_before(model, files, tmp_path):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    do_export(model, tmp_path / "out", files)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_export_is_a_base(model, files, tmp_path):
    do_export(model, tmp_path / "out", files)
    base = resolve_base(ModelConfig(base=str(tmp_path / "out")), endpoint="http://127.0.0.1:1")
    again = load_gpt(base)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert torch.equal(load_mel_norms(base), load_mel_norms(files))
    assert all(torch.equal(a, b) for a, b in zip(load_dvae(base).buffers(), load_dvae(files).buffers(), strict=True))


@pytest.mark.parametrize("dtype, torch_dtype", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("attention_buffers", [True, False])
def test_other_layouts(model, files, tmp_path, dtype, torch_dtype, attention_buffers):
    report = do_export(model, tmp_path / "out", files, dtype=dtype, attention_buffers=attention_buffers)
    published = torch.load(tmp_path / "out" / "100_gpt.pth", weights_only=True)
    assert len(published) == (78 if attention_buffers else 74)
    assert {tensor.dtype for key, tensor in published.items() if key in model.state_dict()} == {torch_dtype}
    assert torch.equal(published["mel_head.weight"], model.mel_head.weight.to(torch_dtype))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert report.self_test.passed


def test_half_precision_model_is_exported_in_float32(model, files, tmp_path):
    half = {key: tensor.bfloat16().float() for key, tensor in model.state_dict().items()}
    do_export(model.bfloat16(), tmp_path / "out", files)
    assert all(torch.equal(tensor, half[key]) for key, tensor in read_gpt_weights(tmp_path / "out/100_gpt.pth").items())
    assert model.mel_head.weight.dtype == torch.bfloat16


def test_compiled_blocks_are_exported_under_their_own_names(model, files, tmp_path):
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.gpt.h[0] = torch.compile(model.gpt.h[0])
    assert any("_orig_mod" in key for key in model.state_dict())
    do_export(model, tmp_path / "out", files)
    read = torch.load(tmp_path / "out/100_gpt.pth", weights_only=True)
    assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())
    assert all(torch.equal(load_file(tmp_path / "out/model.safetensors")[key], expected[key]) for key in expected)


# Refusing


def test_weights_equal_to_the_base_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="nothing was trained"):
        do_export(golden_gpt(), tmp_path / "out", files)
    assert os.listdir(tmp_path) == []


def test_difference_from_the_base_is_measured(model, files, tmp_path):
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.mel_head.bias[3] += 0.25
    report = do_export(model, tmp_path / "out", files, base_state=base)
    assert report.self_test.findings["difference from the base"] == "1 of 74 tensors changed, by 2.5e-01 at most"


def test_values_that_are_not_finite_are_refused(model, files, tmp_path):
    with torch.no_grad():
        model.final_norm.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"NaN or infinite values: final_norm\.bias"):
        do_export(model, tmp_path / "out", files)
    assert os.listdir(tmp_path) == []
    assert model.training


def test_weights_too_large_for_float16_are_refused(model, files, tmp_path):
    with torch.no_grad():
        model.text_head.bias[0] = 1e5
    with pytest.raises(UserError, match=r"float16 .*text_head\.bias"):
        do_export(model, tmp_path / "out", files, dtype="float16")
    assert os.listdir(tmp_path) == []


def test_foreign_folder_is_left_alone(model, files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="left alone"):
            do_export(model, tmp_path / "out", files, overwrite=overwrite)
    assert contents(tmp_path / "out") == {"thesis.txt"}


def test_earlier_export_is_replaced_only_when_asked(model, files, tmp_path):
    do_export(model, tmp_path / "out", files)
    with pytest.raises(UserError, match="--overwrite"):
        do_export(model, tmp_path / "out", files, step=200)
    do_export(model, tmp_path / "out", files, step=200, overwrite=True)
    assert "200_gpt.pth" in contents(tmp_path / "out")
    assert "100_gpt.pth" not in contents(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_failed_replacement_keeps_the_earlier_export(model, files, tmp_path):
    do_export(model, tmp_path / "out", files)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in contents(tmp_path / "out")}
    with pytest.raises(UserError, match="nothing was trained"):
        do_export(model, tmp_path / "out", files, overwrite=True, base_state=model.state_dict())
    assert {name: (tmp_path / "out" / name).read_bytes() for name in contents(tmp_path / "out")} == before


@pytest.mark.parametrize("key", ["gpt.h.1.attn.c_attn.bias", "gpt.h.0.attn.bias"])
def test_file_that_lost_a_tensor_does_not_pass(model, files, tmp_path, monkeypatch, key):
    def forgetful(state_dict, path, write=export.write_published):
        write({name: tensor for name, tensor in state_dict.items() if name != key}, path)

    monkeypatch.setattr(export, "write_published", forgetful)
    with pytest.raises(UserError, match=f"key table.*{key.replace('.', '[.]')}"):
        do_export(model, tmp_path / "out", files)
    assert os.listdir(tmp_path) == []


def test_self_test_notices_one_flipped_value(model, files, tmp_path):
    do_export(model, tmp_path, files)
    trained = model.eval()
    assert run_self_test(trained, tmp_path, "100_gpt.pth").passed
    published = torch.load(tmp_path / "100_gpt.pth", weights_only=True)
    published["gpt.h.1.mlp.c_fc.bias"][0] += 1e-6
    torch.save(published, tmp_path / "100_gpt.pth")
    result = run_self_test(trained, tmp_path, "100_gpt.pth")
    assert not result.passed
    assert "gpt.h.1.mlp.c_fc.bias" in result.failures[0]


def test_self_test_notices_another_function_behind_equal_weights(model, files, tmp_path, monkeypatch):
    """Equal tensors aren't enough: a config with another number of heads computes something else."""
    do_export(model, tmp_path, files)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_heads": 2}))
    result = run_self_test(model.eval(), tmp_path, "100_gpt.pth")
    assert [failure.split(":")[0] for failure in result.failures] == ["model.safetensors logits"]


def test_killed_export_leaves_no_half_folder_and_the_next_one_works(model, files, tmp_path):
    """The process dies between writing the files and renaming the folder."""
    script = (
        "import os, sys, signal, torch\n"
        "from tortoise_hf import export\n"
        "from tortoise_hf.config import ModelConfig\n"
        "from tortoise_hf.models.pretrained import load_gpt, resolve_base\n"
        "files = resolve_base(ModelConfig(base=sys.argv[1]))\n"
        "export.run_self_test = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.export_model(load_gpt(files), sys.argv[2], files=files, step=1, summary={})\n"
    )
    base = files.tokenizer.parent
    done = subprocess.run([sys.executable, "-c", script, str(base), str(tmp_path / "out")], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == [".out.partial"]
    do_export(model, tmp_path / "out", files)
    assert os.listdir(tmp_path) == ["out"]


def test_is_export_tells_exports_from_other_folders(model, files, tmp_path):
    do_export(model, tmp_path / "out", files)
    assert is_export(tmp_path / "out")
    assert not is_export(files.tokenizer.parent)
    (tmp_path / "export.json").write_text("[]")
    assert not is_export(tmp_path)


def test_unknown_dtype_is_named(model, files, tmp_path):
    with pytest.raises(UserError, match="float32, float16, bfloat16"):
        do_export(model, tmp_path / "out", files, dtype="fp16")


def test_released_dvae_is_not_carried_along(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(type(files), "dvae_is_released", property(lambda self: True))
    do_export(model, tmp_path / "out", files)
    assert not (tmp_path / "out" / "dvae").exists()


def test_layout_of_the_export_is_complete_at_full_size():
    """470 keys, in the published order, from the sizes in config.json alone."""
    assert len(published_layout(TortoiseGPT.config_class())) == 470
