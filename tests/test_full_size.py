"""A run that starts from a file of the published layout and size: 30 layers, 421.5 million weights, 1.7 GB on disk.

The values are random, written by the test; everything else is as with the released file, found in a local folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REFERENCE, SENTENCES
from safetensors.torch import save_file

from tortoise_hf.models.checkpoint_formats import published_layout, read_tensors, write_published
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.text import train_tokenizer

GIB = 1 << 30
DISK_NEEDED = 22 * GIB
"""The file (1.7 GB), and what the run wants to see free: three checkpoints (5.1 GB each) and two exports."""
MEMORY_ALLOWED = 20 * GIB  # of the 24 GB a machine shall need

# Prints the process's largest memory use when the script is through.
MEASURED = """
import atexit, os, resource, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))  # as Python does for a script
atexit.register(lambda: print("peak KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def room(tmp_path):
    """A folder for the big files, emptied afterwards."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < 20 * GIB or shutil.disk_usage(tmp_path).free < DISK_NEEDED:
        pytest.skip(f"needs 20 GiB of memory and {DISK_NEEDED // GIB} GiB of disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_random_published_file(path):
    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for key, (shape, dtype) in published_layout(GPTConfig()).items():
        if key.endswith(".attn.bias"):
            state_dict[key] = torch.ones(shape[-2:], dtype=dtype).tril().view(shape)
        elif key.endswith("masked_bias"):
            state_dict[key] = torch.tensor(-1e4)
        else:
            state_dict[key] = torch.randn(shape, generator=generator, dtype=dtype) * 0.02
    write_published(state_dict, path)


@pytest.mark.timeout(1500)
def test_run_from_a_file_in_the_published_layout_and_size(repository, room, tiny_voice):
    weights, base, run = (room / name for name in ("weights", "base", "run"))
    weights.mkdir()
    base.mkdir()
    save_file({"mel_norms": -torch.linspace(2, 9, 80)}, base / "mel_norms.safetensors")
    DVAE(DVAEConfig(hidden_size=8, codebook_dim=8, num_codes=8192, num_resnet_blocks=1)).save_pretrained(base / "dvae")
    if (REFERENCE / "tokenizer.json").exists():
        shutil.copyfile(REFERENCE / "tokenizer.json", weights / "tokenizer.json")
        write_random_published_file(weights / "autoregressive.pth")
    else:  # without the released tokenizer there is no telling what released weights' rows mean: all is the base's own
        train_tokenizer(SENTENCES * 3, 60).save(base / "tokenizer.json")
        write_random_published_file(base / "autoregressive.pth")
    settings = {
        "data.root": tiny_voice(3),
        "data.cache_dir": room / "cache",
        "data.eval_fraction": 0,
        "model.base": base,
        "model.weights_dir": weights,
        "training.output_dir": run,
        "training.max_steps": 1,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "training.logging_steps": 1,
        "training.save_total_limit": 1,
        "callbacks.progress": "false",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(repository / "scripts" / "train.py"), *flags],
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(os.cpu_count()),
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    peak = 1024 * int(re.search(r"peak KiB (\d+)", done.stdout)[1])
    assert 5 * GIB < peak < MEMORY_ALLOWED, f"{peak / GIB:.1f} GiB"

    stored = json.loads((run / "export" / "export.json").read_text())
    assert stored["self_test"]["passed"]
    assert stored["self_test"]["findings"]["key table"] == "470 keys, all as published"
    assert re.match(r"4\d\d of 410 tensors changed", stored["self_test"]["findings"]["difference from the base"])
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in read_tensors(run / "export/1_gpt.pth").items()}
    assert found == published_layout(GPTConfig())
