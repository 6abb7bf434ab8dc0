"""What is left of a run, and whether it is what an undisturbed run leaves."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.world import World
from trunkline.client.state.permissions import open_seal
from trunkline.client.state.vault import Vault
from trunkline.config.run import RunConfig
from trunkline.errors import StorageError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.strategies import StrategyState, build_strategy

CLOCK = ("seconds",)  # keys of report.json that are readings of a clock


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Args:
        round: that its newest checkpoint is of.
        trunk: digest of that checkpoint's arrays; heads: site -> digest of everything private of its newest vault entry.
        rounds: by round, the sites whose updates were counted.
        report: without what a clock told.
        miscounted: of the last rounds, those whose trunk is not the one before it with each site's update added once.
        seconds: from the command to the end.
    """

    round: int
    trunk: str
    heads: dict[str, str]
    rounds: list[tuple[int, tuple[str, ...]]]
    report: Any
    miscounted: list[str]
    seconds: float


def outcome_of(world: World, out: Path, run: RunConfig, seconds: float) -> Outcome:
    """Raises StorageError where a checkpoint or a vault cannot be read."""
    found = Checkpoint(out).load()
    assert found is not None, f"{out}: no checkpoint"
    state, meta = found
    heads = {}
    for site, folder in world.states.items():
        newest = Vault(folder, meta["key"], seal=open_seal(folder)).before(state.round + 1)
        assert newest is not None, f"{site}: its vault has nothing of run {meta['key']}"
        heads[site] = _digest(newest.private)
    rounds = [(one["round"], tuple(one["sites"])) for one in meta["records"]]
    miscounted = [
        text for record in meta["records"][-2:] if (text := _miscounted(world, out, run, meta["key"], record))
    ]
    report = _timeless(json.loads((out / "report.json").read_text()))
    return Outcome(state.round, state.trunk.digest(), heads, rounds, report, miscounted, seconds)


def _miscounted(world: World, out: Path, run: RunConfig, key: str, record: Mapping[str, Any]) -> str:
    """What is wrong with the trunk of a round: it is made again here, of what the sites' own vaults say that they sent."""
    number = record["round"]
    if set(record.get("admitted", record["sites"])) != set(record["sites"]):
        return f"round {number}: admitted {sorted(record['admitted'])}, counted {record['sites']}"
    checkpoint = Checkpoint(out)
    try:
        before, after = (_trunk(checkpoint, one) for one in (number - 1, number))
        updates = []
        for site in record["sites"]:
            folder = world.states[site]
            tensors, meta = Vault(folder, key, seal=open_seal(folder)).shelf.get(number)
            entry = Vault._entry(tensors, meta)
            updates.append(
                Update(
                    site=site,
                    run=key,
                    round=number,
                    delta=entry.delta,
                    weight=entry.weight,
                    metrics=dict(entry.metrics),
                )
            )
    except StorageError:
        return ""  # one of the files was damaged by the drill, or is older than what is kept
    strategy = build_strategy(run.strategy.name, run.strategy.options, run.training)
    made, _ = strategy.advance(StrategyState(before, {}, number - 1, {}), iter(updates))
    if made.trunk.digest() != after.digest():
        return f"round {number}: the trunk is not the one before it and each of {', '.join(record['sites'])} once"
    return ""


def _trunk(checkpoint: Checkpoint, round: int) -> Arrays:
    tensors, meta = checkpoint.shelf.get(round)
    names: Any = meta["names"]
    return Arrays({name: tensors[f"trunk/{name}"] for name in names["trunk"]})


def differences(expected: Outcome, found: Outcome) -> list[str]:
    """What a disturbed run left that the undisturbed one did not. Where other sites took part, only what holds all the same."""
    problems: list[str] = []
    problems += found.miscounted
    numbers = [number for number, _ in found.rounds]
    if numbers != [number for number, _ in expected.rounds] or found.round != expected.round:
        problems.append(f"its rounds are {numbers}, its checkpoint is of round {found.round}")
    for number, sites in found.rounds:
        if len(set(sites)) < len(sites):
            problems.append(f"round {number} counted a site twice: {', '.join(sites)}")
    if not same_sites(expected, found):
        return problems
    if found.trunk != expected.trunk:
        problems.append(f"the trunk is {found.trunk[:12]}, not {expected.trunk[:12]}")
    problems += [
        f"the heads of {site} are {found.heads[site][:12]}, not {digest[:12]}"
        for site, digest in expected.heads.items()
        if found.heads[site] != digest
    ]
    problems += [f"report.json: {line}" for line in _unlike(expected.report, found.report)[:5]]
    return problems


def same_sites(expected: Outcome, found: Outcome) -> bool:
    """Whether the same sites were counted in every round."""
    return found.rounds == expected.rounds


def _digest(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in CLOCK}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _unlike(expected: Any, found: Any, where: str = "") -> list[str]:
    """Where two values of JSON differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted({*expected, *found})
        return [
            line for key in keys for line in _unlike(expected.get(key), found.get(key), f"{where}.{key}".strip("."))
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for at, pair in enumerate(zip(expected, found, strict=True))
            for line in _unlike(*pair, f"{where}[{at}]")
        ]
    return [] if expected == found else [f"{where} is {str(found)[:120]}, not {str(expected)[:120]}"]
