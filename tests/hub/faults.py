"""Faults that a test asks the loopback Hub for: error answers, bodies cut in half, connections that end unanswered."""

import re
import threading
from dataclasses import dataclass

ERRORS = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden",
    404: "Not found",
    429: "Too many requests",
    500: "Internal server error",
    502: "Bad gateway",
    503: "Service unavailable",
    504: "Gateway timeout",
}
CUTS = ("truncate", "drop")


@dataclass
class Fault:
    """What the next `left` requests that fit are answered with."""

    method: str
    pattern: re.Pattern[str]
    answer: int | str
    left: int
    seen: int = 0


class Faults:
    """The faults that were asked for, in that order (`asked`)."""

    def __init__(self) -> None:
        self.asked: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, method: str, pattern: str, answer: int | str, times: int = 1) -> Fault:
        """Set a fault: see `LoopbackHub.fail`."""
        if answer not in CUTS and answer not in ERRORS:
            raise ValueError(f"{answer!r} is neither one of {CUTS} nor one of the statuses {sorted(ERRORS)}.")
        fault = Fault(method, re.compile(pattern), answer, times)
        with self._lock:
            self.asked.append(fault)
        return fault

    def take(self, method: str, path: str) -> int | str | None:
        """The answer that a request must have, or None; counts it."""
        with self._lock:
            for fault in self.asked:
                if fault.left > 0 and fault.method in (method, "*") and fault.pattern.search(path):
                    fault.left -= 1
                    fault.seen += 1
                    return fault.answer
        return None

    def clear(self) -> None:
        """Forget every fault."""
        with self._lock:
            self.asked.clear()
