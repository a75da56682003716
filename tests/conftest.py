"""What every test shares: no network, one thread, a fixed seed, and which tests this machine can run."""

import os
import tempfile

# The code that `trust_remote_code=True` copies goes here: not to the user's cache, and no stale copy reaches a test.
_modules = tempfile.TemporaryDirectory(prefix="alibi-hf-modules-")

# Set before the imports that read them.
os.environ["HF_MODULES_CACHE"] = _modules.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist runs one process a core
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, the tests that need a device or a run that this is not."""
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "needs a CUDA device"
    if os.environ.get("CI_FULL") != "1":
        absent["ci_full"] = "part of the long matrix: set CI_FULL=1"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
