"""Runs a script as its first argument says, with processes on CPU that pass for devices."""

import runpy
import sys
from pathlib import Path

from tests.distributed.accelerated import use_cpus_as_devices

use_cpus_as_devices()
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
