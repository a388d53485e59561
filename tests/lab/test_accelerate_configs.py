"""The shipped accelerate configurations: the installed accelerate reads each and means by it what its comment says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

import finetune_lab.lab

FOLDER = Path(finetune_lab.lab.__file__).parent / "assets" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
KIND = {
    "one_gpu": DistributedType.NO,
    "many_gpus_fsdp2": DistributedType.FSDP,
    "many_gpus_zero3": DistributedType.DEEPSPEED,
    "many_nodes_fsdp2": DistributedType.FSDP,
}


def launch_arguments(path: Path):
    """What `accelerate launch --config_file PATH script.py` works with."""
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, mixed_precision_from_file = _validate_launch_command(parsed)
    assert mixed_precision_from_file
    return arguments


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_as_the_kind_it_is_named_for(path):
    assert load_config_from_file(str(path)).distributed_type == KIND[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_an_option_of_accelerate_launch(path):
    options = set(vars(launch_command_parser().parse_args(["script.py"])))
    config = load_config_from_file(str(path))
    assert {*config.fsdp_config, *config.deepspeed_config} <= options


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_says_what_was_run(path):
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "# Run: no" in comment and "Tested: accelerate" in comment and f"--config_file {path.name}" in comment


@pytest.mark.parametrize("name", ["many_gpus_fsdp2", "many_nodes_fsdp2"])
def test_the_launch_environment_makes_an_fsdp2_plugin(name, monkeypatch):
    for key, value in prepare_multi_gpu_env(launch_arguments(FOLDER / f"{name}.yaml")).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)  # with shards, Trainer.save_model writes no weights
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


def test_many_nodes_count_the_processes_of_all_machines():
    arguments = launch_arguments(FOLDER / "many_nodes_fsdp2.yaml")
    assert (arguments.num_machines, arguments.num_processes, arguments.use_fsdp) == (2, 16, True)


def test_zero3_is_launched_through_deepspeed():
    arguments = launch_arguments(FOLDER / "many_gpus_zero3.yaml")
    assert arguments.use_deepspeed and arguments.zero_stage == 3


def test_no_configuration_is_missing():
    assert {path.stem for path in FILES} == set(KIND)
