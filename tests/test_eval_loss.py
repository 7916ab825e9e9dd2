"""One evaluation's value, however its clips are cut into batches and processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from test_loop import RandomExamples

from tortoise_hf.data.collate import Collator
from tortoise_hf.data.loader import EvalBatches
from tortoise_hf.data.sampler import StepSampler
from tortoise_hf.eval_loss import evaluate

NUM_CLIPS = 23
BATCH_SIZES = (1, 4, 16)


def evaluate_all(accelerator, folder) -> list[dict[str, float]]:
    """The value for each batch size, on this process's share of the clips."""
    examples, model, cfg = RandomExamples(NUM_CLIPS), golden_gpt(), make_config(folder)
    found = []
    for batch_size in BATCH_SIZES:
        sampler = StepSampler(
            examples.lengths, NUM_CLIPS, batch_size, accelerator.num_processes, accelerator.process_index
        )
        batches = EvalBatches(examples, sampler, Collator.for_model(model.config))
        found.append(evaluate(accelerator, model, batches, cfg.optim))
    return found


def test_batch_sizes_and_processes_give_one_value(tmp_path):
    found = evaluate_all(Accelerator(cpu=True), tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    group |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for output in outputs:
        answer = json.loads(output.splitlines()[-1])
        assert answer["num_processes"] == 2
        found += answer["found"]
    assert len(found) == 9
    assert found[0]["eval_loss"] > 1
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    results = evaluate_all(accelerator, Path(sys.argv[1]))
    print(json.dumps({"num_processes": accelerator.num_processes, "found": results}))
    accelerator.end_training()
