"""A search chooses on validation rows alone, by the same effort for both sides, and goes on where it stopped."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console

from tests.loopback import QUICK, WatchedGrid, trunk_of
from trunkline.client.site import Site
from trunkline.client.state.vault import Vault
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.config.run import RunConfig, parse_run
from trunkline.errors import ConfigError, DataError, QuorumError, StorageError
from trunkline.runtime.events import Event, Note
from trunkline.server.rounds.run import run_rounds
from trunkline.simulations import search as searching
from trunkline.simulations.search import FILE, SIDES, SearchState, print_search, read_search, search

RATES = (0.0005, 0.005, 0.05)
Surface = Callable[[RunConfig, str, str], float]  # (run, who, site) -> validation loss


def run_of(trials: int = 3, space: dict[str, Any] | None = None, minutes: float = 10.0, **settings: Any) -> RunConfig:
    table = {"trials": trials, "minutes": minutes, "rounds": 2}
    table["space"] = {"training.learning_rate": list(RATES)} if space is None else space
    return parse_run({**QUICK, "report": {"baseline": True}, "search": table, **settings}, "test")


def states_of(plants: list[Path], out: Path) -> list[Path]:
    return [out / "state" / plant.name for plant in plants]


@pytest.fixture(scope="module")
def pair(plants: list[Path]) -> list[Path]:
    """Two of the built-in factories; the laws here do not ask for more."""
    return plants[:2]


@pytest.fixture(scope="module")
def made(
    pair: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, SearchState, WatchedGrid, Path]:
    """A real search over loopback: the run it ended with, what it tried, every message, the folder."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("search")
    grid = WatchedGrid(pair, out)
    lines: list[str] = []
    run = search(run_of(), grid, states_of(pair, out), out, lambda event: lines.append(event.to_json()["text"]))
    found = read_search(out)
    assert found is not None
    assert len(lines) == 3
    return run, found, grid, out


def test_no_site_is_asked_to_score_and_no_test_row_is_touched(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = Site.resident, set[str]()

    def watched(site: Site, part: Literal["train", "curve", "validation", "test"]) -> DeviceDataset:
        seen.add(part)
        return honest(site, part)

    monkeypatch.setattr(Site, "resident", watched)
    grid = WatchedGrid(pair, tmp_path)
    search(run_of(trials=2), grid, states_of(pair, tmp_path), tmp_path, lambda event: None)
    assert seen == {"train", "curve"}
    assert {kind.split(".")[-1] for kind, _, _ in grid.down} == {"query", "train"}


def test_both_sides_get_the_same_trials_and_keep_what_did_best(
    pair: list[Path], made: tuple[RunConfig, SearchState, WatchedGrid, Path]
) -> None:
    run, found, _, _ = made
    assert len(found.trials) == 3
    for who, at in (("federated", run.training.learning_rate), ("local", run.report.local["training.learning_rate"])):
        assert found.trials[0].settings[who]["training.learning_rate"] == 0.005  # the run file's own
        figures = [found.figure(who, trial) for trial in found.trials]
        assert figures[0] == pytest.approx(1.0)
        assert at == found.trials[figures.index(min(figures))].settings[who]["training.learning_rate"]
        assert all(set(trial.losses[who]) == {folder.name for folder in pair} for trial in found.trials)


def test_trials_leave_nothing_but_the_figures(made: tuple[RunConfig, SearchState, WatchedGrid, Path]) -> None:
    out = made[3]
    assert not list(out.glob("search/*"))
    assert not list(out.glob("state/*/vault/*"))
    assert (out / FILE).is_file()


def test_a_search_that_was_stopped_goes_on_to_the_same_choice_and_repeats_no_trial(
    pair: list[Path], tmp_path: Path, made: tuple[RunConfig, SearchState, WatchedGrid, Path]
) -> None:
    told: list[str] = []

    def interrupted(event: Event) -> None:
        assert isinstance(event, Note)
        told.append(event.text)
        if len(told) == 3:
            raise KeyboardInterrupt

    states, grid = states_of(pair, tmp_path), WatchedGrid(pair, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(run_of(), grid, states, tmp_path, interrupted)
    done = read_search(tmp_path)
    assert done is not None
    assert len(done.trials) == 2  # the third was told, but not yet written
    again = WatchedGrid(pair, tmp_path)
    run = search(run_of(), again, states, tmp_path, lambda event: None, resume=True)
    whole, found = made[1], read_search(tmp_path)
    assert found is not None
    assert [(one.settings, one.losses) for one in found.trials] == [(one.settings, one.losses) for one in whole.trials]
    assert run == made[0]
    trained = sum(kind == "train" for kind, _, _ in again.down)
    assert trained == sum(kind == "train" for kind, _, _ in made[2].down) // 3
    third = WatchedGrid(pair, tmp_path)
    assert search(run_of(), third, states, tmp_path, lambda event: None, resume=True) == run
    assert not third.down


def test_the_twin_takes_its_own_settings_and_changes_nothing_that_is_shared(pair: list[Path], tmp_path: Path) -> None:
    def twins(out: str) -> list[bytes]:
        found = []
        for state in states_of(pair, tmp_path / out):
            entry = Vault(state, next((state / "vault").iterdir()).name).before(10**6)
            assert entry is not None
            found += [entry.local[name].tobytes() for name in sorted(entry.local)]
        return found

    def trained(out: str, rate: float, dropout: float, local: dict[str, float]) -> None:
        training, trunk = {**QUICK["training"], "learning_rate": rate}, {**QUICK["trunk"], "dropout": dropout}
        report = {"baseline": True, "local": local}
        run = parse_run({**QUICK, "rounds": 2, "training": training, "trunk": trunk, "report": report}, "test")
        grid = WatchedGrid(pair, tmp_path / out)
        run_rounds(grid, run, tmp_path / out, resume=False, on_event=lambda event: None, score=False)

    trained("own", 0.005, 0.1, {"training.learning_rate": 0.0005, "trunk.dropout": 0.3})
    trained("as-twin", 0.0005, 0.3, {})
    trained("without", 0.005, 0.1, {})
    assert twins("own") == twins("as-twin")
    assert twins("own") != twins("without")
    assert trunk_of(tmp_path / "own").digest() == trunk_of(tmp_path / "without").digest()


def pretend(monkeypatch: pytest.MonkeyPatch, surface: Surface) -> list[RunConfig]:
    """Replace the federation by a known loss surface; returns the runs it is asked for, as they come."""
    asked: list[RunConfig] = []

    def ended(grid: object, run: RunConfig, *_: object, **__: object) -> dict[str, Any]:
        asked.append(run)
        curves = {
            site: {
                "validation_loss": surface(run, "federated", site),
                "local_validation_loss": surface(run, "local", site),
            }
            for site in ("large", "small")
        }
        return {"rounds": [{"curves": {}}, {"curves": curves}]}

    monkeypatch.setattr(searching, "run_rounds", ended)
    return asked


def bowl(run: RunConfig, who: str, site: str) -> float:
    """Lowest at 0.002 for the federation and at 0.01 for who trains alone; one site's losses are a thousand times the other's."""
    rate = run.training.learning_rate if who == "federated" else run.report.local["training.learning_rate"]
    away = abs(GRID.index(float(rate)) - GRID.index(0.002 if who == "federated" else 0.01))
    return (1.0 + away) * (1000.0 if site == "large" else 1.0)


GRID = [0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05]


def test_each_side_finds_its_own_optimum_at_any_scale_of_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, bowl)
    run = run_of(trials=16, space={"training.learning_rate": GRID})
    found = search(run, None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]
    assert found.training.learning_rate == 0.002
    assert found.report.local == {"training.learning_rate": 0.01}
    assert len(asked) == 16
    assert all(one.rounds == 2 for one in asked)
    assert found.rounds == run.rounds
    tried = read_search(tmp_path)
    assert tried is not None
    for one, trial in zip(asked, tried.trials, strict=True):  # each side is judged by its own curve
        assert trial.losses == {who: {site: bowl(one, who, site) for site in ("large", "small")} for who in SIDES}
    shown = io.StringIO()
    print_search(tried, Console(file=shown, width=120))
    assert shown.getvalue().count("0.002") >= 2
    assert "the local baseline" in shown.getvalue()


def test_a_site_with_large_losses_does_not_outvote_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(run: RunConfig, who: str, site: str) -> float:
        high = run.training.learning_rate == 0.05
        return (990.0 if high else 1000.0) if site == "large" else (2.0 if high else 1.0)  # 1 % against a factor of two

    pretend(monkeypatch, torn)
    run = run_of(trials=6, space={"training.learning_rate": [0.005, 0.05]}, report={"baseline": False})
    assert search(run, None, [], tmp_path, lambda event: None).training.learning_rate == 0.005  # type: ignore[arg-type]


def test_a_trial_that_fails_or_diverges_is_a_bad_one_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wild(run: RunConfig, who: str, site: str) -> float:
        rate = run.training.learning_rate
        if rate == 0.05:
            raise QuorumError("nobody answered")
        return float("inf") if rate == 0.0005 else 1.0

    pretend(monkeypatch, wild)
    lines: list[str] = []
    run = search(run_of(trials=8), None, [], tmp_path, lambda event: lines.append(event.to_json()["text"]))  # type: ignore[arg-type]
    assert run.training.learning_rate == 0.005
    found = read_search(tmp_path)
    assert found is not None
    assert {trial.settings["federated"]["training.learning_rate"] for trial in found.trials} == set(RATES)
    assert any("nobody answered" in line for line in lines)
    with pytest.raises(QuorumError):  # but a run file that does not run by itself is not searched around
        monkeypatch.setattr(searching, "run_rounds", lambda *_, **__: (_ for _ in ()).throw(QuorumError("none")))
        search(run_of(), None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]


def test_no_trial_starts_after_the_minutes_are_over_not_even_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, run = pretend(monkeypatch, bowl), run_of(trials=50, minutes=1e-9, space={"training.learning_rate": GRID})
    for resume in (False, True):
        search(run, None, [], tmp_path, lambda event: None, resume=resume)  # type: ignore[arg-type]
    assert len(asked) == 1


def test_the_baseline_searches_what_it_has_and_nothing_of_the_federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda run, who, site: 1.0)
    space = {"training.private_rate": [0.1, 1.0], "strategy.head_share": [0.3, 0.5], "trunk.dropout": [0.0, 0.1]}
    run = run_of(space=space, strategy={"name": "fedrep"})
    search(run, None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]
    found = read_search(tmp_path)
    assert found is not None
    assert (set(found.spaces["federated"]), set(found.spaces["local"])) == (set(space), {"trunk.dropout"})
    alone = run_of(space=space, strategy={"name": "local"})
    with pytest.raises(ConfigError, match="head_share"):  # not an option of that strategy: said before any trial
        search(alone, None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"training.keep": ["best", "last"]}, "cannot be searched"),
        ({"seed": [1.0, 2.0]}, "cannot be searched"),
        ({"selection.default": ["local"]}, "`selection.default` cannot be searched"),
        ({"training.steps_": [1.0]}, "did you mean 'steps'"),
        ({"training.learning_rate": [0.01, -1.0]}, "learning_rate"),
        ({"strategy.head_shar": [0.5]}, "head_shar"),
    ],
)
def test_what_cannot_be_searched_is_named_before_any_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: dict[str, Any], words: str
) -> None:
    asked = pretend(monkeypatch, lambda run, who, site: 1.0)
    with pytest.raises(ConfigError, match=words):
        search(run_of(space=space), None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]
    assert not asked


def test_another_run_file_or_a_damaged_record_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda run, who, site: 1.0)
    search(run_of(), None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"another run\.toml"):
        search(run_of(seed=6), None, [], tmp_path, lambda event: None, resume=True)  # type: ignore[arg-type]
    (tmp_path / FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(StorageError, match=FILE):
        read_search(tmp_path)


def test_without_a_validation_row_there_is_nothing_to_choose_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda run, who, site: float("nan"))
    with pytest.raises(DataError, match="validation"):
        search(run_of(), None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]
