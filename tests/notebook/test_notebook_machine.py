"""What a card can do, and what pip is told."""

import importlib.metadata
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tortoise_hf.notebook import machine, places
from tortoise_hf.notebook import requirements as module
from tortoise_hf.notebook.cell import CellStopped, in_words
from tortoise_hf.notebook.machine import Gpu, choose_precision, describe, parse_gpus
from tortoise_hf.notebook.requirements import requirements

T4, L4 = Gpu("Tesla T4", 15.0, (7, 5)), Gpu("NVIDIA L4", 22.5, (8, 9))


def test_what_the_driver_says_is_read():
    assert parse_gpus("Tesla T4, 15360, 7.5\nNVIDIA A100-SXM4, 40GB, 40960, 8.0\n") == [
        T4,
        Gpu("NVIDIA A100-SXM4, 40GB", 40.0, (8, 0)),
    ]
    assert parse_gpus("") == []


def test_no_driver_is_no_card(monkeypatch):
    monkeypatch.setattr(machine, "_QUERY", ["no-such-program-as-this"])
    assert machine.find_gpus() == []


def test_only_visible_cards_count(monkeypatch):
    answer = SimpleNamespace(returncode=0, stdout="Tesla T4, 15360, 7.5\nNVIDIA L4, 23040, 8.9\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(machine.find_gpus()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.name for gpu in machine.find_gpus()] == ["NVIDIA L4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.find_gpus() == []


@pytest.mark.parametrize("gpus, precision", [([], "no"), ([T4], "fp16"), ([L4], "bf16"), ([L4, T4], "fp16"),
                                             ([Gpu("GTX 1080", 8, (6, 1))], "no")])  # fmt: skip
def test_the_precision_is_what_all_cards_are_quick_in(gpus, precision):
    assert choose_precision(gpus) == precision


def test_too_little_is_warned_of():
    assert not any("Warning" in line for line in describe([T4], 50e9))
    assert not any("Warning" in line for line in describe([Gpu("RTX 4060", 7.996, (8, 9))], 50e9))
    assert "takes 8 GiB or more, so this card" in describe([Gpu("RTX 3050", 4, (8, 6))], 50e9)[-1]
    assert "there is no GPU" in describe([], 50e9)[-1]


# --- installing ------------------------------------------------------------------------------------------------------


def test_the_machines_own_torch_is_no_requirement():
    declared = ["torch==2.11.*", "torchaudio==2.11.*", "numpy>=2.0", "torchmetrics>1", 'pytest>=8.3; extra == "dev"']
    assert requirements(declared, {"torch": "2.9.0"}) == ["numpy>=2.0", "torchmetrics>1"]
    assert requirements(declared, None) == ["torch==2.11.*", "torchaudio==2.11.*", "numpy>=2.0", "torchmetrics>1"]


@pytest.fixture
def pip(monkeypatch):
    """Records what pip would be told; importing torch in another process is taken to work."""
    calls = []

    def run(command, **_):
        if "pip" in command:
            pins, *wanted = command[command.index("-c") + 1 :]
            calls.append((wanted, Path(pins).read_text()))
        return SimpleNamespace(returncode=run.code, stdout="", stderr="ERROR: no such thing")

    run.code = 0
    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(calls=calls, run=run)


def test_torch_is_pinned_where_it_is(pip, capsys):
    module.install()
    ((wanted, pins),) = pip.calls
    assert pins == "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in ("torch", "torchaudio"))
    assert any(line.startswith("accelerate") for line in wanted)
    assert not any(line.startswith("torch") for line in wanted)
    assert "works and stays. 0 packages installed or renewed" in capsys.readouterr().out


def test_an_old_torch_is_replaced(pip, monkeypatch):
    versions = {"torch": "2.1.0+cu118", "torchaudio": "2.1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    module.install()
    ((wanted, pins),) = pip.calls
    assert pins == ""
    assert any(line.startswith("torchaudio") for line in wanted)


def test_a_failure_is_told(pip, monkeypatch):
    pip.run.code = 1
    monkeypatch.setattr(module, "working_torch", lambda: None)
    with pytest.raises(CellStopped, match="ERROR: no such thing"):
        module.install()


def test_what_was_in_use_needs_a_restart(pip, monkeypatch, capsys):
    versions = iter([{"numpy": "2.0.0", "tqdm": "4"}, {"numpy": "2.4.0", "tqdm": "4", "inflect": "7"}])
    monkeypatch.setattr(module, "installed_versions", lambda: next(versions))
    module.install()
    said = capsys.readouterr().out
    assert "2 packages installed or renewed" in said
    assert "In use were numpy: restart" in said


# --- Colab and Kaggle ------------------------------------------------------------------------------------------------


def test_places_that_only_colab_has(tmp_path):
    assert places.find_place(f" {tmp_path} ") == str(tmp_path)
    assert places.find_place("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="only Colab can mount"):
        places.find_place("/content/drive/MyDrive/recordings")
    with pytest.raises(ValueError, match="Only Colab uploads"):
        places.find_place("upload")


def test_the_token_comes_from_the_secrets(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="There is no token for the Hub"):
        places.find_token()
    monkeypatch.setattr(places, "_secret", lambda: "hf_secret")
    places.find_token()
    assert places.os.environ["HF_TOKEN"] == "hf_secret"
    monkeypatch.setattr(
        huggingface_hub, "get_token", lambda: "hf_of_colab"
    )  # which only the notebook's process may ask
    places.find_token()
    assert places.os.environ["HF_TOKEN"] == "hf_of_colab"
    monkeypatch.delenv("HF_TOKEN")


def test_a_cell_ends_with_the_sentence_alone():
    @in_words
    def fail():
        from tortoise_hf.errors import UserError

        raise UserError("The list is empty.")

    with pytest.raises(CellStopped) as stopped:
        fail()
    assert stopped.value._render_traceback_() == ["error: The list is empty."]
