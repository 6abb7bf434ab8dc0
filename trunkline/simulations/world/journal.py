"""Where a simulated world stood after each round, in the run's folder: what --resume goes on from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trunkline.errors import StorageError
from trunkline.simulations.world.clock import SECOND

JOURNAL = "world.jsonl"


@dataclass(frozen=True)
class WorldState:
    """A world at the end of a round; times in us of virtual time.

    Args:
        now: the time.
        began: when the round began.
        joined: nodes that are members of the run.
        busy: node -> until when it works.
        line: node -> until when its line is taken.
        ended: round -> virtual seconds at its end, of this and all rounds before.
    """

    now: int
    began: int | None
    joined: frozenset[int]
    busy: Mapping[int, int]
    line: Mapping[int, int]
    ended: Mapping[int, float]


class WorldJournal:
    """One line a round in `world.jsonl`.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / JOURNAL

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)

    def append(self, round: int, state: WorldState) -> None:
        """Write the world's state at the end of `round`.

        Raises:
            StorageError: the file cannot be written.
        """
        line = {
            "round": round, "at": state.now, "began": state.began, "joined": sorted(state.joined),
            "busy": _after(state.now, state.busy), "line": _after(state.now, state.line),
        }  # fmt: skip
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {error}. Make room, then go on with --resume."
            ) from error

    def read(self, round: int) -> WorldState:
        """The world's state at the end of `round`.

        Raises:
            StorageError: the file cannot be read, or does not have that round.
        """
        try:
            lines = [
                json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line[-1:] == "}"
            ]
            by_round = {line["round"]: line for line in lines}  # of a round that was run twice, the second time counts
            line = by_round[round]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self.path}: does not say where the world stood after round {round} ({type(error).__name__}). "
                "Restore it, or start the run anew with --overwrite."
            ) from error
        return WorldState(
            now=line["at"],
            began=line["began"],
            joined=frozenset(line["joined"]),
            busy={int(node): until for node, until in line["busy"].items()},
            line={int(node): until for node, until in line["line"].items()},
            ended={earlier: line["at"] / SECOND for earlier, line in by_round.items() if earlier <= round},
        )


def _after(now: int, times: Mapping[int, int]) -> dict[str, int]:
    """Of `times` by node those that lie behind `now`, for JSON."""
    return {str(node): time for node, time in times.items() if time > now}
