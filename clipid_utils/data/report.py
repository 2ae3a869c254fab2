"""A report on the rows that a reader, a filter or a check has seen: how many were kept, and why others were dropped."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = 5  # shown for each reason


@dataclass
class Report:
    """Counts of rows: each row that was `read` is `kept`, or dropped for one reason."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first few for each reason

    @property
    def read(self) -> int:
        return self.kept + self.dropped.total()

    def keep(self) -> None:
        self.kept += 1

    def drop(self, reason: str, *place: object) -> None:
        """Counts a dropped row. `place` names it: its line, its key or its text, or the arguments of `example`."""
        self.dropped[reason] += 1
        if len(shown := self.examples.setdefault(reason, [])) < EXAMPLES:
            shown.append(example(*place))

    def count(self, reason: str | None, *place: object) -> bool:
        """Counts a row, which is dropped if there is a reason. Returns whether it is kept."""
        self.drop(reason, *place) if reason else self.keep()
        return not reason

    def __str__(self) -> str:
        lines = [f"{self.read:,} read, {self.kept:,} kept, {self.dropped.total():,} dropped"]
        for reason, count in self.dropped.most_common():
            lines += [f"{count:8,} {reason}", *(f"{'':10}{example}" for example in self.examples[reason])]
        return "\n".join(lines)


def example(name: str | Path, place: int | str | None = None, text: object = "") -> str:
    """The name of a row; with `place`, a line or a different place in the file `name`, and the text there."""
    if place is None:
        return str(name)
    name = f"{name.name}:{place}" if isinstance(place, int) else f"{name.name}, {place}"
    return f"{name}: {str(text)[:80]!r}" if text else name
