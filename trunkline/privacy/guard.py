"""What a guard is: one privacy mechanism, with what it does at the site, at the server and on the sum of a round."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from pydantic import Field

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.frozen import Frozen


class Demands(Frozen):
    """The part of a site's policy that is about guards; each guard adds the keys of its own limits."""

    guards: tuple[str, ...] = Field(default=(), description="what a run must have")


class Guard(Protocol):
    """One mechanism. A file in this folder defines it, and a line of `GUARDS` adds it.

    `Settings` are its keys in `[guards]` of run.toml, all of them absent by default; `Demands` are its keys in a policy.
    """

    NAME: ClassVar[str]
    Settings: ClassVar[type[Frozen]]
    Demands: ClassVar[type[Demands]]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self | None:
        """The guard of a run; None where its settings are absent.

        Args:
            settings: those of all guards, checked.
        """
        ...

    @classmethod
    def objection(cls, guard: Self | None, demands: Any) -> str:
        """Why a policy refuses a run with this guard, or (None) without it; empty where it does not."""
        ...

    @classmethod
    def meet(cls, demands: Any) -> dict[str, Any]:
        """Settings that a policy accepts; empty where it demands nothing of this guard."""
        ...

    def words(self) -> str:
        """Name and parameters as a plant reads them in a contract: `clip(10)`."""
        ...

    def parameters(self) -> dict[str, bool | int | float | str]:
        """What the card of a release records."""
        ...

    def at_site(self, delta: Arrays) -> Arrays:
        """What leaves the site in place of its update `delta`, of the same names and shapes."""
        ...

    def at_server(self, delta: Arrays) -> Arrays:
        """What enters the sum in place of the update that arrived.

        Raises:
            ContractError: the update cannot have passed `at_site`.
        """
        ...

    def at_sum(self, total: Arrays, survivors: Sequence[str]) -> Arrays:
        """What moves the trunk in place of the finished mean of a round.

        Args:
            survivors: the sites whose updates are in it.
        """
        ...
