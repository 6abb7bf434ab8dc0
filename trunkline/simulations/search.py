"""`[search]`: settings chosen on validation rows before the run, by whole runs of the federation, in simulation only.

Each trial is a run like the one that follows (same grid, same apps, same sites) that ends before any test row is
scored. Two searches go side by side through the same trials: one for the federation, one for the local baseline, each by
its own validation loss. Neither may be tuned more than the other, or the report would compare efforts, not methods.
The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna (Akiba et al. 2019,
arXiv:1907.10902), seeded afresh for each trial, so that a search that was stopped goes on as if it had not been.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trunkline.config.renames import rename_overrides
from trunkline.config.run import RunConfig, with_settings
from trunkline.errors import ConfigError, DataError, StorageError, TrunklineError
from trunkline.protocol.arrays import seed_of
from trunkline.runtime.events import Note, OnEvent
from trunkline.runtime.storage import write_atomic
from trunkline.server.rounds.messaging import Transport
from trunkline.server.rounds.run import run_rounds
from trunkline.strategies import build_strategy

FILE = "search.json"
FORMAT = 1
SIDES = ("federated", "local")
CURVES = {"federated": "validation_loss", "local": "local_validation_loss"}
Value = int | float | str
Settings = dict[str, Value]
Space = dict[str, list[Value]]

# What pays to try first. Not the steps: with more of them a trial is not better but longer, and the two sides would no
# longer have the same epochs. A run file that wants the steps searched names them.
DEFAULT_SPACE: dict[str, tuple[Value, ...]] = {
    "training.learning_rate": (0.0005, 0.001, 0.002, 0.005, 0.01),
    "training.private_rate": (0.03, 0.1, 0.3, 1.0),
    "training.weight_decay": (0.001, 0.01, 0.1),
    "training.augment.jitter": (0.0, 0.05, 0.1, 0.2),
    "trunk.dropout": (0.0, 0.1, 0.2, 0.3),
}
# what a site that trains alone does not have: rates and pulls between parts, and what happens after the rounds
FEDERATED_ONLY = (
    "private_rate", "proximal", "personal", "finish_steps", "finish_rate", "finetune_steps", "finetune_rate",
)  # fmt: skip
# how a model is picked from its rounds is what a trial is measured by, so it cannot be searched by that measure
MEASURE = ("training.keep", "training.patience_rounds", "training.phases", "training.finish_parts")
WORST = 10.0  # figure of a trial that failed or diverged, in units of the first trial's loss
STARTUP = 8  # trials before the sampler models what it has seen; fewer than 16 trials in all: half of them


@dataclass(frozen=True)
class Trial:
    """One run of the federation with one set of settings for each side.

    Args:
        settings: side -> key path -> value, over the run file.
        losses: side -> site -> the validation loss of the model the site would have used.
        cause: why there are no losses, in the words of the error.
    """

    number: int
    settings: dict[str, Settings]
    losses: dict[str, dict[str, float]]
    seconds: float
    cause: str = ""


@dataclass(frozen=True)
class SearchState:
    """The trials of a search so far, and its seconds: the content of search.json."""

    digest: str
    spaces: dict[str, Space]
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0
    done: bool = False

    def figure(self, side: str, trial: Trial) -> float:
        """The validation loss over the first trial's, geometric mean over the sites: below 1 is better.

        The first trial has the settings of the run file, so a site whose losses are in the thousands weighs no more than
        one whose losses are small.
        """
        first = {site: loss for site, loss in self.trials[0].losses.get(side, {}).items() if loss > 0.0}
        if not first:
            return 1.0
        losses = trial.losses.get(side, {})
        ratios = [min(WORST, max(losses.get(site, math.inf) / loss, 1.0 / WORST**3)) for site, loss in first.items()]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    def best(self, side: str) -> Trial:
        """The trial with the smallest figure; the earlier one of equals, and so the run file's own settings first."""
        return min(self.trials, key=lambda trial: (self.figure(side, trial), trial.number))


def search(
    run: RunConfig, grid: Transport, states: Sequence[Path], out: Path, on_event: OnEvent,
    *, resume: bool = False,
) -> RunConfig:  # fmt: skip
    """`run` with the settings that did best, and `report.local` with those of the baseline.

    Args:
        grid: with every site of the federation on it.
        states: the sites' state folders; a trial's entries in their vaults are removed again.
        out: folder of the run: search.json is kept there, trials write below `out`/search and leave nothing.
        on_event: takes a Note for each trial.
        resume: go on with the trials in search.json; finished ones are not repeated.

    Raises:
        ConfigError: a key cannot be searched, a value cannot be set, or optuna is not installed.
        DataError: no site has a validation row to choose by.
        StorageError: search.json is damaged or cannot be written.
        TrunklineError: the run fails with its own settings; another trial that fails counts as a bad one.
    """
    state = (read_search(out) if resume else None) or SearchState(_digest(run), _spaces(run))
    if state.digest != _digest(run):
        raise ConfigError(
            f"{out / FILE}: this search was started with another run.toml. Resume with the settings it was started with, "
            "or give another --out."
        )
    while not state.done:
        number = len(state.trials)
        if number >= run.search.trials or (number and state.seconds >= 60.0 * run.search.minutes):
            state = replace(state, done=True)
        else:
            trial = _try(run, grid, states, out, number, _suggest(state, run, number))
            state = replace(state, trials=(*state.trials, trial), seconds=state.seconds + trial.seconds)
            if not number and not any(state.trials[0].losses.values()):
                raise DataError(
                    "[search]: no site has a labelled validation row to choose by. Drop [search], or give validation labels."
                )
            on_event(Note(_line(state, run, trial)))
        write_atomic(out / FILE, json.dumps({"format": FORMAT, **asdict(state)}, indent=1).encode(), mode=0o644)
    best = {side: state.best(side).settings[side] for side in state.spaces}
    local = {"report.local": {**run.report.local, **best["local"]}} if best.get("local") else {}
    return with_settings(run, {**best["federated"], **local}, "[search]")


def read_search(out: Path) -> SearchState | None:
    """The search in `out`/search.json; None where there is no such file.

    Raises:
        StorageError: it is damaged or of another format.
    """
    path = out / FILE
    try:
        table = json.loads(path.read_bytes())
        if table.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        return SearchState(**{**table, "trials": tuple(Trial(**trial) for trial in table["trials"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path}: damaged ({type(error).__name__}: {error}). Remove it to search again, with --overwrite."
        ) from error


def print_search(state: SearchState | None, console: Console) -> None:
    """Every trial's settings that varied, and its two figures; the best of each side marked."""
    if state is None or not state.trials:
        return
    for side, space in state.spaces.items():
        best, keys = state.best(side), list(space)
        title = "the federation" if side == "federated" else "the local baseline"
        console.print(f"\nSearch for {title}: validation loss over that of the run file")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for header in ("trial", *(key.rsplit(".", 1)[-1] for key in keys), "loss"):
            table.add_column(header, justify="right")
        for trial in state.trials:
            values = (f"{trial.settings[side][key]}" for key in keys)
            figure = f"{state.figure(side, trial):.3f}" if trial.losses.get(side) else "failed"
            table.add_row(str(trial.number + 1), *values, figure, style="bold" if trial is best else None)
        console.print(table)


def _digest(run: RunConfig) -> str:
    return hashlib.sha256(json.dumps(run.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _spaces(run: RunConfig) -> dict[str, Space]:
    """Side -> key path -> values in order, the run file's own among them.

    Raises:
        ConfigError: a key that names no setting, or one that a search cannot choose.
    """
    named = rename_overrides(RunConfig, run.search.space, "[search] space") or DEFAULT_SPACE
    for key in named:
        if key in MEASURE or not key.startswith(("training.", "trunk.", "strategy.")) or key == "strategy.name":
            raise ConfigError(
                f"[search] space: `{key}` cannot be searched. Settings under training, trunk and strategy can, except "
                f"{', '.join((*MEASURE, 'strategy.name'))}."
            )
        for value in named[key]:
            tried = with_settings(run, {key: value}, "[search] space")
            build_strategy(tried.strategy.name, tried.strategy.options, tried.training)
    spaces: dict[str, Space] = {"federated": {key: _values(run, key, named[key]) for key in named}}
    lends = build_strategy(run.strategy.name, run.strategy.options, run.training).lends(run.lend)
    if run.report.baseline and lends:
        alone = with_settings(run, run.report.local, "[report] local")
        keys = [key for key in named if not key.startswith("strategy.") and key.split(".")[1] not in FEDERATED_ONLY]
        spaces["local"] = {key: _values(alone, key, named[key]) for key in keys}
    return spaces


def _values(run: RunConfig, key: str, values: Sequence[Value]) -> list[Value]:
    """`values` and the value of `run`, ascending where they are numbers."""
    current = _value_at(run, key)
    every = list(dict.fromkeys(values if current is None else [*values, current]))
    return sorted(every) if all(isinstance(value, (int, float)) for value in every) else every


def _value_at(run: RunConfig, key: str) -> Value | None:
    """The value of `run` at a key path; None where it has none, as for another strategy's options."""
    table: Any = run.model_dump(mode="json")
    for step in key.split("."):
        table = table.get(step) if isinstance(table, dict) else None
    value: Value | None = table
    return value


def _current_settings(run: RunConfig, space: Space) -> Settings:
    """The value of `run` for each key of `space`; the first value where it has none."""
    settings = {key: _value_at(run, key) for key in space}
    return {key: values[0] if (value := settings[key]) is None else value for key, values in space.items()}


def _suggest(state: SearchState, run: RunConfig, number: int) -> dict[str, Settings]:
    """Settings to try next, by side; trial 0 is the run file as it stands, so that a search never ends below it."""
    if number == 0:
        runs = {"federated": run, "local": with_settings(run, run.report.local, "[report] local")}
        return {side: _current_settings(runs[side], space) for side, space in state.spaces.items()}
    return {side: _ask(state, run, side, space, number) for side, space in state.spaces.items()}


def _ask(state: SearchState, run: RunConfig, side: str, space: Space, number: int) -> Settings:
    try:
        import optuna
    except ImportError:
        raise ConfigError("[search] needs optuna: pip install 'trunkline[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # a list of numbers is searched by index: neighbours are alike, and the steps may be uneven
    kinds: dict[str, Any] = {
        key: optuna.distributions.IntDistribution(0, len(values) - 1)
        if all(isinstance(value, (int, float)) for value in values)
        else optuna.distributions.CategoricalDistribution(list(range(len(values))))
        for key, values in space.items()
    }
    startup = min(STARTUP, max(1, run.search.trials // 2))
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=startup, seed=seed_of(run.seed, "search", side, number) % 2**32
    )
    study = optuna.create_study(sampler=sampler)
    for trial in state.trials:
        indices = {key: space[key].index(trial.settings[side][key]) for key in space}
        study.add_trial(optuna.trial.create_trial(params=indices, distributions=kinds, value=state.figure(side, trial)))
    asked = study.ask(kinds)
    return {key: values[asked.params[key]] for key, values in space.items()}


def _try(
    run: RunConfig, grid: Transport, states: Sequence[Path], out: Path, number: int, settings: dict[str, Settings]
) -> Trial:
    """Run the federation once, without its end: no site is asked to score a test row."""
    key, folder = f"search-{number:03d}", out / "search" / f"trial-{number:03d}"
    plan = with_settings(run, settings["federated"], "[search]")
    local = {**run.report.local, **settings.get("local", {})}
    report = plan.report.model_copy(update={"local": local})
    plan = plan.model_copy(update={"rounds": run.search.rounds or run.rounds, "refit": False, "report": report})
    if plan.rounds < 2:
        raise ConfigError(
            "[search] rounds = 1: what a site validates in a round is the model of the round before. Give at least 2."
        )
    start, losses, cause = time.monotonic(), {}, ""
    _forget(states, folder, key)  # of a trial that was stopped half-way
    try:
        folder.mkdir(parents=True)
        ended = run_rounds(grid, plan, folder, resume=False, on_event=lambda event: None, key=key, score=False)
        losses = {side: _losses(ended["rounds"], CURVES[side], plan.training.keep) for side in settings}
    except TrunklineError as error:
        if number == 0:
            raise
        cause = str(error)
    finally:
        _forget(states, folder, key)
    return Trial(number, settings, losses, time.monotonic() - start, cause)


def _losses(rounds: Sequence[Mapping[str, Any]], curve: str, keep: str) -> dict[str, float]:
    """Site -> validation loss of the model it would have used: the best over the rounds, or the last one's."""
    losses: dict[str, float] = {}
    for record in rounds:
        for site, metrics in record["curves"].items():
            loss = metrics.get(curve)
            if loss is not None and math.isfinite(loss):
                losses[site] = min(loss, losses.get(site, math.inf)) if keep == "best" else loss
    return losses


def _forget(states: Sequence[Path], folder: Path, key: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for state in states:
        shutil.rmtree(state / "vault" / key, ignore_errors=True)


def _line(state: SearchState, run: RunConfig, trial: Trial) -> str:
    """`Search: trial 3 of 20, 41 s. federated 0.962 (best 0.951, trial 1); local ...`"""
    sides = []
    for side in state.spaces:
        best = state.best(side)
        figure = f"{state.figure(side, trial):.3f}" if trial.losses.get(side) else "failed"
        sides.append(f"{side} {figure} (best {state.figure(side, best):.3f}, trial {best.number + 1})")
    return f"Search: trial {trial.number + 1} of {run.search.trials}, {trial.seconds:.0f} s. {'; '.join(sides)}" + (
        f". {trial.cause}" if trial.cause else ""
    )
