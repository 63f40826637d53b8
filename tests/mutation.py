"""One way to break a kernel, which the interpreter must notice."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """``new`` stands for the occurrence of ``old`` that follows ``after``."""

    what: str
    program: str  # of tests/interpreter
    file: str  # below cuda/
    old: str
    new: str
    after: str = ""

    def apply(self, text: str) -> str:
        start = text.index(self.after)
        place = text.index(self.old, start)
        return text[:place] + self.new + text[place + len(self.old) :]
