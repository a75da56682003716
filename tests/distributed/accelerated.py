"""What a config of `accelerate launch` sets up, without a launch; and FSDP2 on CPU, which Accelerate itself refuses."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def parse(config: str, *options: str) -> dict[str, str]:
    """Return the environment that `accelerate launch --config_file CONFIG OPTIONS` gives its processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), *options, "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if os.environ.get(name) != value}


def allow_fsdp_on_cpu() -> None:
    """Let processes on CPU pass for processes with a device each, where Accelerate looks whether FSDP is meant."""
    start = AcceleratorState.__init__

    def start_with_devices(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = start_with_devices
