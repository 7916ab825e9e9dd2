"""The files that describe machines load with accelerate's own classes and say what they are for."""

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from conftest import REPOSITORY

FILES = sorted([*REPOSITORY.glob("configs/accelerate/*.yaml"), REPOSITORY / "accelerate_config.yaml"])
EXPECTED = {
    "accelerate_config": (DistributedType.NO, 1, "no"),
    "cpu": (DistributedType.NO, 1, "no"),
    "one_gpu_fp16": (DistributedType.NO, 1, "fp16"),
    "one_gpu_bf16": (DistributedType.NO, 1, "bf16"),
    "multi_gpu": (DistributedType.MULTI_GPU, 2, "bf16"),
    "fsdp2": (DistributedType.FSDP, 2, "bf16"),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 2, "bf16"),
    "two_nodes": (DistributedType.MULTI_GPU, 4, "bf16"),
}


def test_all_are_there():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_is_explained(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == EXPECTED[path.stem]
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_launch_takes_it(path):
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    if path.stem == "deepspeed_zero2":
        pytest.importorskip("deepspeed")  # the launcher asks for it
    args = _validate_launch_command(args)[0]
    assert args.num_processes == EXPECTED[path.stem][1]
    if path.stem == "fsdp2":
        assert (args.use_fsdp, int(args.fsdp_version)) == (True, 2)
        assert args.fsdp_transformer_layer_cls_to_wrap == "GPT2Block"
    if path.stem == "two_nodes":
        assert (args.num_machines, args.machine_rank) == (2, 0)
