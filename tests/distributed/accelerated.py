"""What a config of `accelerate launch` sets up, without a launch; and sharding on CPU, which Accelerate refuses."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def parse(config: str, *options: str) -> dict[str, str]:
    """Return the environment that `accelerate launch --config_file CONFIG OPTIONS` gives its processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), *options, "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_fsdp or arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
    elif arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def use_cpus_as_devices() -> None:
    """Let processes on CPU pass for processes with a device each, which alone Accelerate shards models over."""
    start = AcceleratorState.__init__

    def start_with_devices(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = start_with_devices
