"""`alibi-hf`: the package's verbs on the command line, each a thin call of the function of the same name.

Exit status: 0 done, 1 done but not proved, 2 bad input.
"""

from . import checkpoints, hub, measurements  # each adds its verbs to the app
from .running import app

__all__ = ["app", "checkpoints", "hub", "measurements"]
