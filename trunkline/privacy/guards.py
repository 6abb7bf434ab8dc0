"""The table of guards, and the guards of a run applied in order.

Sites apply them in the order of the table, the server in reverse. A run's guard settings travel in its requests, so that
a plant's policy can demand a guard.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from trunkline.errors import ContractError
from trunkline.privacy.clip import Clip
from trunkline.privacy.guard import Demands, Guard
from trunkline.protocol.arrays import Arrays

GUARDS: dict[str, type[Guard]] = {
    Clip.NAME: Clip,
}
Settings = Mapping[str, Any] | BaseModel  # `[guards]` of a run, as a model or as it travels


def guards_of(settings: Settings) -> tuple[Guard, ...]:
    """The guards of a run, in the order in which a site applies them.

    Raises:
        ContractError: a setting belongs to no guard here, or is out of its range.
    """
    table = settings_table(settings)
    kinds = {key: kind for kind in GUARDS.values() for key in kind.Settings.model_fields}
    if unknown := [key for key in table if key not in kinds]:
        raise ContractError(
            f"this run has the guard setting `{unknown[0]}`, which this Trunkline does not know. It is older: update it"
        )
    guards = []
    for kind in GUARDS.values():
        keys = {key: value for key, value in table.items() if kinds[key] is kind}
        try:
            checked = kind.Settings.model_validate(keys).model_dump()
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise ContractError(f"guard setting `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
        if (guard := kind.of(checked)) is not None:
            guards.append(guard)
    return tuple(guards)


def settings_table(settings: Settings) -> dict[str, Any]:
    """The settings that are set, by key, as they travel."""
    table = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    return {key: value for key, value in table.items() if value is not None}


def words(settings: Settings) -> tuple[str, ...]:
    """The guards of a run as a contract names them, such as ("clip(10)",)."""
    return tuple(guard.words() for guard in guards_of(settings))


def objection(settings: Settings, demands: Demands) -> str:
    """Why a policy refuses a run with these guards; empty where it does not."""
    guards = {guard.NAME: guard for guard in guards_of(settings)}
    objections = (kind.objection(guards.get(name), demands) for name, kind in GUARDS.items())
    return next(filter(None, objections), "")


def settings_that_meet(demands: Demands) -> dict[str, Any]:
    """Settings of a run whose guards a policy accepts."""
    return {key: value for kind in GUARDS.values() for key, value in kind.meet(demands).items()}


def at_site(guards: Sequence[Guard], delta: Arrays) -> Arrays:
    """What leaves a site in place of its update."""
    for guard in guards:
        delta = guard.at_site(delta)
    return delta


def at_server(guards: Sequence[Guard], delta: Arrays) -> Arrays:
    """What enters the sum in place of an update that arrived. Raises ContractError where a guard refuses it."""
    for guard in reversed(guards):
        delta = guard.at_server(delta)
    return delta


def at_sum(guards: Sequence[Guard], total: Arrays, survivors: Sequence[str]) -> Arrays:
    """What moves the trunk in place of the finished mean of a round, which holds the updates of `survivors`."""
    for guard in reversed(guards):
        total = guard.at_sum(total, survivors)
    return total
