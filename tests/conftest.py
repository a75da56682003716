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
    """Skip the tests that need a device that is not here."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
