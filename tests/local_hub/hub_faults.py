"""What the local Hub does wrong on demand."""

import re
import threading
from dataclasses import dataclass
from typing import Any


@dataclass
class Fault:
    kind: str
    where: re.Pattern
    times: int | None
    value: Any


class Faults:
    """Rules by kind. A rule is spent after `times` requests whose `"METHOD /path"` its regex finds (None: never)."""

    def __init__(self):
        self._rules: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, kind: str, where: str, times: int | None, value: Any = True) -> None:
        with self._lock:
            self._rules.append(Fault(kind, re.compile(where), times, value))

    def take(self, kind: str, line: str) -> Any:
        """The value of the first rule that applies, which counts as used once; None if there is none."""
        with self._lock:
            for rule in self._rules:
                if rule.kind == kind and rule.times != 0 and rule.where.search(line):
                    if rule.times is not None:
                        rule.times -= 1
                    return rule.value
        return None
