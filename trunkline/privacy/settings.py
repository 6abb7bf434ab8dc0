"""The keys of all guards together: `[guards]` of run.toml, and the guard keys of a site's policy."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, create_model

from trunkline.privacy.guard import Demands
from trunkline.privacy.guards import GUARDS
from trunkline.protocol.frozen import Frozen

if TYPE_CHECKING:  # the models are made of the table when this is imported; a type checker sees what is common to all

    class GuardSettings(Frozen):
        """`[guards]` of run.toml."""

    class GuardDemands(Demands):
        """The guard keys of a policy."""

else:
    GuardSettings = create_model(
        "GuardSettings", __base__=tuple(kind.Settings for kind in GUARDS.values()), __module__=__name__,
        __doc__="`[guards]` of run.toml: what is done to every update before it leaves a site.",
    )  # fmt: skip
    GuardDemands = create_model(
        "GuardDemands", __module__=__name__,
        # a guard without limits of its own leaves the class as it is, which may stand there only once
        __base__=tuple(kind.Demands for kind in GUARDS.values() if kind.Demands is not Demands) or (Demands,),
        __doc__="The guard keys of a policy: what a run must have.",
        guards=(tuple[Literal[tuple(GUARDS)], ...], Field(default=(), description="what a run must have")),
    )  # fmt: skip
