"""The errors of this package; every message says what was found, the values that disagree, and what to do."""


class AlibiError(ValueError):
    """Base of all errors that this package raises on purpose; the command line exits 2 on them."""


class UnknownFamilyError(AlibiError):
    """The checkpoint belongs to no family that this package knows."""


class ConfigFieldError(AlibiError):
    """A field of the checkpoint's config.json is not understood, or its value cannot be expressed."""


class TensorError(AlibiError):
    """A tensor is missing, left over, of the wrong shape, or holds values that are refused."""


class CheckpointFileError(AlibiError):
    """A file or folder is missing, truncated, in the way, or contradicts the index."""


class NotProvedError(AlibiError):
    """Verification ran and did not prove that the two models compute the same; the command line exits 1."""


class UnsafeSourceError(AlibiError):
    """Reading the source would need something that is off by default, such as unpickling."""


def in_one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says, for a message that names its cause."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


__all__ = [
    "AlibiError",
    "CheckpointFileError",
    "ConfigFieldError",
    "NotProvedError",
    "TensorError",
    "UnknownFamilyError",
    "UnsafeSourceError",
    "in_one_line",
]
