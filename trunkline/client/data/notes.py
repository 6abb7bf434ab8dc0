"""What opening a site has to say: notes to look at, and problems that must be mended first.

Every stage collects instead of raising at the first trouble, so that `trunkline check` shows a plant engineer all of it
at once. `open_data` raises one DataError with the same words.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from trunkline.errors import DataError


@dataclass(frozen=True)
class Note:
    """Something cleaning did, or something that deserves a look. Nothing is wrong enough to stop."""

    level: Literal["info", "warning"]
    where: str
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Problem:
    """Something that must be mended before the site can train: where it is, what was found, what to do."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (f"{self.where}:" if self.where else "", self.what, self.remedy) if part)


@dataclass
class Findings:
    """The notes and problems of one opening, in the order they came up."""

    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    aside: dict[str, Problem] = field(default_factory=dict)  # task -> why it cannot be trained here

    def info(self, where: str, what: str, remedy: str = "") -> None:
        self.notes.append(Note("info", where, what, remedy))

    def warn(self, where: str, what: str, remedy: str = "") -> None:
        self.notes.append(Note("warning", where, what, remedy))

    def problem(self, where: str, what: str, remedy: str = "") -> None:
        self.problems.append(Problem(where, what, remedy))

    def set_aside(self, task: str, where: str, what: str, remedy: str = "") -> None:
        """One task cannot be trained; the others go on. The first reason counts, the next ones follow from it."""
        self.aside.setdefault(task, Problem(where, what, remedy))

    def judge_tasks(self, left: Collection[str]) -> None:
        """Warn of every task that was set aside; where no task is left to train, each of them is a problem."""
        for task, problem in self.aside.items():
            if left:
                self.warn(f"task {task}", f"is set aside, and the others go on. {problem}")
            else:
                self.problems.append(problem)

    def refuse(self) -> None:
        """Raise DataError with every problem on its own line, if there is one."""
        if self.problems:
            raise DataError("\n".join(str(problem) for problem in self.problems))


def counted(count: int, noun: str) -> str:
    """`1 row`, `2,345 rows`: for messages."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def some(words: list[str], most: int = 12) -> str:
    """The first `most` words with commas, and how many were left out."""
    more = f", ... ({len(words) - most} more)" if len(words) > most else ""
    return ", ".join(words[:most]) + more
