"""A report on the rows that a reader, a filter or a check has seen: how many were kept, and why others were dropped."""

from collections import Counter
from dataclasses import dataclass, field

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

    def drop(self, reason: str, example: str) -> None:
        """Counts a dropped row. `example` names it, by its line, its key or its text."""
        self.dropped[reason] += 1
        if len(shown := self.examples.setdefault(reason, [])) < EXAMPLES:
            shown.append(example)

    def __str__(self) -> str:
        lines = [f"{self.read:,} read, {self.kept:,} kept, {self.dropped.total():,} dropped"]
        for reason, count in self.dropped.most_common():
            lines += [f"{count:8,} {reason}", *(f"{'':10}{example}" for example in self.examples[reason])]
        return "\n".join(lines)
