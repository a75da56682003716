"""What the tests of this folder share."""

import pytest

from tests.security.folders import Folders, make_folders


@pytest.fixture(scope="session")
def folders() -> Folders:
    """Return folders that no test changes."""
    return make_folders()
