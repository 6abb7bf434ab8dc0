"""A guard that nobody needs, in its own file: it doubles at the site, halves at the server, and forgets at the sum.

Run as a program it adds its line to the table, runs a federation with it, and prints what came of it as JSON.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trunkline.privacy.guard import Demands
from trunkline.privacy.guards import GUARDS
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.frozen import Frozen


class ToySettings(Frozen):
    toy_share: float | None = None


@dataclass(frozen=True)
class Toy:
    NAME: ClassVar[str] = "toy"
    Settings: ClassVar[type[Frozen]] = ToySettings
    Demands: ClassVar[type[Demands]] = Demands
    calls: ClassVar[dict[str, list[Any]]] = {"site": [], "server": [], "sum": []}

    share: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Toy | None":
        share = settings.get("toy_share")
        return cls(share) if share is not None else None

    @classmethod
    def objection(cls, guard: "Toy | None", demands: Demands) -> str:
        return "its policy demands the guard `toy`" if cls.NAME in demands.guards and guard is None else ""

    @classmethod
    def meet(cls, demands: Demands) -> dict[str, Any]:
        return {"toy_share": 0.5} if cls.NAME in demands.guards else {}

    def words(self) -> str:
        return f"toy({self.share:g})"

    def parameters(self) -> dict[str, bool | int | float | str]:
        return {"share": self.share}

    def at_site(self, delta: Arrays) -> Arrays:
        self.calls["site"].append(len(delta))
        return Arrays({name: array * 2 for name, array in delta.items()})

    def at_server(self, delta: Arrays) -> Arrays:
        self.calls["server"].append(len(delta))
        return Arrays({name: array / 2 for name, array in delta.items()})

    def at_sum(self, total: Arrays, survivors: Sequence[str]) -> Arrays:
        self.calls["sum"].append(sorted(survivors))
        return Arrays({name: np.zeros_like(array) for name, array in total.items()})


if __name__ == "__main__":
    GUARDS[Toy.NAME] = Toy
    from tests.loopback import federate, trunk_of
    from trunkline.client.policy import contracts
    from trunkline.release import RELEASE, open_release
    from trunkline.server.rounds.checkpoint import Checkpoint

    out, *folders = map(Path, sys.argv[1:])
    (folders[0] / "policy.toml").write_text('guards = ["toy"]\n')
    federate(folders, out, plant=True, rounds=1, guards={"toy_share": 0.25})
    state = out / "state" / folders[0].name
    (consent,) = contracts.every(state)
    release = open_release(out / RELEASE)
    assert release.card.lineage is not None
    before, _ = Checkpoint(out).shelf.get(0)
    after, _ = Checkpoint(out).shelf.get(1)
    trunk = trunk_of(out)
    print(json.dumps({
        "calls": Toy.calls,
        "contract": dict(contracts.in_words(consent))["guards"],
        "card": [guard.model_dump() for guard in release.card.lineage.guards],
        "arrays": len(trunk),
        "moved": any(before[name].tobytes() != after[name].tobytes() for name in before),
    }))  # fmt: skip
