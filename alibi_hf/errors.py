"""The errors of this package; every message says what was found, the values that disagree, and what to do."""

import re

# Tokens of the Hugging Face Hub: of users and organisations, and of sign-ins, which have dots. In a URL %20 or the like
# may stand before them.
TOKEN = re.compile(
    r"(?:(?<![A-Za-z0-9_])|(?<=%[0-9A-Fa-f]{2}))"
    r"(?:hf_(?:oauth|jwt)_[\w.-]{19,}\w|(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{20,})",
    re.ASCII,
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user and password in a URL
_LONGEST, _END = 2000, 500  # characters of a message, and of its end, which says what to do


class AlibiError(ValueError):
    """Base of all errors that this package raises on purpose; the command line exits 2 on them.

    Its message never holds a token, whatever path, id or cause it repeats, and is no longer and no stranger than a
    terminal can take, whatever a file holds.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(redact(arg)) if isinstance(arg, str) else arg for arg in args))


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


class SecretError(AlibiError):
    """A file that would be published holds something shaped like a token."""


class HubError(AlibiError):
    """The Hub, or the way to it, says no; the message never holds a token."""


def redact(text: str) -> str:
    """Return a text with "[hidden]" for each token of the Hub, and for user and password in a URL."""
    return _LOGIN.sub("[hidden]", TOKEN.sub("[hidden]", text))


def printable(text: str) -> str:
    """Return a text with control characters as escapes, and of a long one the start and the end."""
    if len(text) > _LONGEST:
        left_out = len(text) - _LONGEST
        text = f"{text[: _LONGEST - _END]} [{left_out} characters left out] {text[-_END:]}"
    if all(each.isprintable() for each in text.split("\n")):
        return text
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def in_one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says, for a message that names its cause."""
    lines = redact(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


__all__ = [
    "TOKEN",
    "AlibiError",
    "CheckpointFileError",
    "ConfigFieldError",
    "HubError",
    "NotProvedError",
    "SecretError",
    "TensorError",
    "UnknownFamilyError",
    "UnsafeSourceError",
    "in_one_line",
    "printable",
    "redact",
]
