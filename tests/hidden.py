"""A process in which this package cannot be found: what a reader of the Hub has who never installed it."""

import sys
from pathlib import Path

# Put before the code of such a process.
HIDE = '''
import sys

class Hidden:
    """Refuses the package by name."""
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "alibi_hf":
            raise ImportError("alibi_hf is hidden")

sys.meta_path.insert(0, Hidden())
try:
    import alibi_hf
    raise SystemExit("the package is not hidden")
except ImportError:
    pass
'''
NEVER_SEEN = '\nassert not any(name.split(".")[0] == "alibi_hf" for name in sys.modules)\n'


def hidden(code: str, *arguments: str | Path) -> list[str | Path]:
    """The command that runs code where the package is hidden, and sees at the end that it never came in."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []  # the current folder is no place to import from
    return [sys.executable, *safe, "-c", HIDE + code + NEVER_SEEN, *arguments]
