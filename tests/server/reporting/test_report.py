"""The worth-it report: what it claims, what it may show, and that it survives whatever a run leaves behind."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from trunkline.config.run import RunConfig
from trunkline.errors import DataError, StorageError
from trunkline.protocol.messages import TaskRow
from trunkline.server.reporting.plots import MOST_POINTS, Predictions, average_precision
from trunkline.server.reporting.records import Refusal, RoundRecord
from trunkline.server.reporting.report import (
    build_report,
    print_report,
    read_report,
    verdict,
    write_report,
)
from trunkline.server.reporting.task_conflicts import conflicts_of, sentences

finite = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(1e-3, 1e6)


def row(**changes: Any) -> TaskRow:
    values: dict[str, Any] = {
        "task": "rul", "kind": "regression", "metric": "rmse", "unit": "cycles", "better": "lower",
        "n_train": 800, "n_validation": 120, "n_test": 240, "n_groups": 12,
        "local": 20.0, "federated": 17.0, "chosen": "federated", "interval": (-4.0, -2.0),
    }  # fmt: skip
    return TaskRow(**(values | changes))


def record(number: int = 1, **changes: Any) -> RoundRecord:
    values: dict[str, Any] = {
        "round": number, "sites": ["kiln-02", "press-07"], "refused": [], "seconds": 2.0,
        "bytes_up": 2000, "bytes_down": 4000, "train_loss": 0.5,
        "metrics": {"press-07": {"rul.federated": 20.0 / number, "rul.local": 22.0, "validation_loss": 0.4}},
    }  # fmt: skip
    return RoundRecord(**(values | changes))


def report_of(rows: list[tuple[str, TaskRow]], rounds: list[RoundRecord] | None = None) -> dict[str, Any]:
    return build_report(
        run=RunConfig(name="turbofans", rounds=3, seed=7),
        rows=rows,
        rounds=[record(1), record(2)] if rounds is None else rounds,
        trunk_parameters=61234,
        seconds=75.0,
    )


def printed(report: dict[str, Any], width: int) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=width, no_color=True))
    return file.getvalue()


def page(tmp_path: Path, report: dict[str, Any], predictions: dict[tuple[str, str], Predictions] | None = None) -> str:
    write_report(report, tmp_path, predictions or {})
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def every_kind(n: int = 200) -> dict[tuple[str, str], Predictions]:
    draw = np.random.default_rng(0)
    truth, chance = draw.uniform(0, 125, n), draw.random(n)
    names = np.array(["closed", "lag", "open"])
    several = (draw.random((n, 20)) > 0.8).astype(float)
    ahead = truth[:, None] + np.arange(3.0)
    band = ahead[..., None] + np.array([-4.0, 0.0, 4.0])
    score = np.where(chance > 0.7, 2.0, 0.5) + draw.normal(0, 0.1, n)
    return {
        ("press-07", "alarms"): Predictions(
            several,
            draw.random((n, 20)),
            draw.random((n, 20)),
            "",
            "multilabel",
            names=tuple(f"A{i}" for i in range(20)),
        ),
        ("press-07", "wear"): Predictions(
            draw.integers(0, 3, n), draw.dirichlet([1, 1, 1], n), None, "", "ordinal", names=("new", "worn", "gone")
        ),
        ("press-07", "load"): Predictions(
            ahead, band, band + 5, "kW", "forecast", order=np.arange(n), quantiles=(0.1, 0.5, 0.9), horizons=(1, 2, 3)
        ),
        ("press-07", "leak"): Predictions(
            (chance > 0.7).astype(float),
            score,
            2 * score,
            "",
            "anomaly",
            order=np.arange(n),
            thresholds={"federated": 1.2},
        ),
        ("press-07", "rul"): Predictions(truth, truth + draw.normal(0, 5, n), truth + 9, "cycles", "regression"),
        ("press-07", "failing"): Predictions((chance > 0.7).astype(int), chance, draw.random(n), "", "binary"),
        ("press-07", "valve"): Predictions(
            names[draw.integers(0, 3, n)], names[draw.integers(0, 3, n)], None, "", "multiclass"
        ),
    }


# --- report.json -------------------------------------------------------------------------------------------------


def test_the_report_has_exactly_the_keys_other_tools_were_promised() -> None:
    report = report_of([("press-07", row())], [record(refused=[Refusal("coil-1", "sent NaN")])])
    assert list(report) == ["trunkline", "run", "cohort", "sites", "conflicts", "rounds"]
    assert set(report["run"]) == {
        "name",
        "strategy",
        "backbone",
        "rounds",
        "refit",
        "seed",
        "trunk_parameters",
        "seconds",
    }
    assert set(report["sites"][0]) == {
        "site", "task", "kind", "metric", "unit", "better", "n_train", "n_validation", "n_test", "local", "federated",
        "chosen", "interval", "verdict", "more", "candidates", "gated", "gated_interval", "gated_verdict",
    }  # fmt: skip
    assert set(report["rounds"][0]) == {
        "round", "sites", "refused", "seconds", "bytes_up", "bytes_down", "train_loss", "curves",
    }  # fmt: skip
    assert report["rounds"][0]["refused"] == [{"site": "coil-1", "cause": "sent NaN"}]
    assert report["cohort"] == ["kiln-02", "press-07"]


def test_sites_come_by_name_and_their_tasks_in_the_order_given() -> None:
    rows = [("press-07", row(task="zeta")), ("kiln-02", row()), ("press-07", row(task="alpha"))]
    found = [(one["site"], one["task"]) for one in report_of(rows)["sites"]]
    assert found == [("kiln-02", "rul"), ("press-07", "zeta"), ("press-07", "alpha")]


def test_what_is_read_back_is_what_was_built(tmp_path: Path) -> None:
    report = report_of([("press-07", row(more={"mae": {"local": 9.0, "federated": None}}, candidates={"fused": 16.5}))])
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 1.5]), min_size=4, max_size=4))
def test_a_curve_that_diverges_leaves_no_nan_in_the_json(values: list[float]) -> None:
    loss, seconds, federated, local = values
    curves = {"press-07": {"rul.federated": federated, "rul.local": local}}
    report = report_of([("press-07", row())], [record(train_loss=loss, seconds=seconds, metrics=curves)])
    text = json.dumps(report, allow_nan=False)  # raises on NaN or infinity
    kept = json.loads(text)["rounds"][0]
    found = [kept["train_loss"], kept["seconds"], kept["curves"]["press-07"]["rul.federated"]]
    assert found == [value if math.isfinite(value) else None for value in (loss, seconds, federated)]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"run": {}}', "\x00"])
def test_a_folder_without_an_intact_report_is_named_in_the_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "report.json"))):
        read_report(tmp_path)


# --- the verdict -------------------------------------------------------------------------------------------------


@given(positive, positive, finite, finite, st.sampled_from(["lower", "higher"]))
def test_an_interval_that_contains_zero_never_helps_or_hurts(
    local: float, federated: float, one: float, other: float, better: str
) -> None:
    words = verdict(row(local=local, federated=federated, interval=(-abs(one), abs(other)), better=better))
    assert words == "no clear difference"


@given(positive, st.floats(1e-3, 1e3), st.floats(0.01, 0.99))
def test_turning_the_direction_round_turns_the_verdict_round(local: float, change: float, share: float) -> None:
    up = {"local": local, "federated": local + change, "interval": (change * share, change * (2 - share))}
    down = {"local": local, "federated": local - change, "interval": (-change * (2 - share), -change * share)}
    for better, good, bad in (("higher", up, down), ("lower", down, up)):
        assert verdict(row(better=better, **good)).startswith("federation helps: ")
        assert verdict(row(better=better, **bad)).startswith("train alone: federation is worse by ")


def test_the_verdict_says_how_much_in_percent_of_training_alone() -> None:
    assert verdict(row(local=25.0, federated=22.0)) == "federation helps: 12 % lower error"
    assert verdict(row(local=25.0, federated=26.0, interval=(0.5, 1.5))) == "train alone: federation is worse by 4 %"
    higher = row(metric="auroc", unit="", better="higher", local=0.8, federated=0.9, interval=(0.05, 0.15))
    assert verdict(higher) == "federation helps: 12 % higher auroc"


def test_an_error_of_zero_alone_gives_the_difference_in_units_instead_of_percent() -> None:
    words = verdict(row(local=0.0, federated=0.5, interval=(0.25, 0.75)))
    assert words == "train alone: federation is worse by 0.5 cycles"


def test_what_was_not_measured_is_said_and_not_guessed() -> None:
    assert verdict(row(local=None, interval=None)) == "no baseline"
    assert verdict(row(federated=None, local=None, interval=None)) == "not measured: no test labels"
    assert verdict(row(interval=None)) == "cannot tell: too few test groups"


# --- the terminal ------------------------------------------------------------------------------------------------

SITE_NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


@settings(max_examples=60, deadline=None)
@example(["x" * 64, "press-07"], 80)
@example(["x" * 30], 120)
@given(st.lists(SITE_NAMES, min_size=1, max_size=4, unique=True), st.sampled_from([80, 100, 120, 200]))
def test_no_site_name_is_cut_at_any_width(names: list[str], width: int) -> None:
    rows = [(name, row(task=task)) for name in names for task in ("rul", "remaining_useful_life_of_pump")]
    lines = printed(report_of(rows, []), width).splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in names)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_shows_every_figure(width: int) -> None:
    report = report_of(
        [("press-07", row()), ("press-07", row(task="failing", metric="auroc", unit="", better="higher"))]
    )
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("20.00", "17.00", "-3.00 (-15 %)", "[-4.00, -2.00]", "rmse (cycles)", "auroc", "federation"):
        assert figure in text


def test_the_summary_counts_outcomes_and_names_each_refusal_once() -> None:
    rows = [
        ("press-07", row()),
        ("press-07", row(task="b", interval=(-1.0, 1.0))),
        ("kiln-02", row(federated=22.0, interval=(1.0, 3.0))),
        ("kiln-02", row(task="b", local=None, interval=None)),
    ]
    refused = [Refusal("kiln-02", "`blocks.0` holds NaN")]
    text = " ".join(printed(report_of(rows, [record(n, refused=refused) for n in (1, 2, 3)]), 200).split())
    assert (
        "Without model selection, federation clearly helps in 1 of 3 site-tasks, makes no clear difference in 1, hurts in 1."
        in text
    )
    assert "1 more could not be compared" in text
    assert text.count("`blocks.0` holds NaN") == 1
    assert "kiln-02 (3 rounds, 1 to 3)" in text
    assert "667 bytes up and 1.3 kB down a site and round" in text  # 2000 and 4000 bytes over three replies
    assert "3 of 3 rounds" in text


def test_what_the_gates_chose_is_counted_beside_what_came() -> None:
    """Two plants lose by joining as it is: one keeps its own model, for the other an ensemble is no worse than alone."""
    rows = [
        ("press-07", row(gated=17.0, gated_interval=(-4.0, -2.0))),
        ("kiln-02", row(federated=22.0, interval=(1.0, 3.0), chosen="local", gated=20.0, gated_interval=(0.0, 0.0))),
        (
            "mill-01",
            row(federated=22.0, interval=(1.0, 3.0), chosen="ensemble", gated=19.5, gated_interval=(-1.0, 0.2)),
        ),
    ]
    text = " ".join(printed(report_of(rows), 200).split())
    assert (
        "Without model selection, federation clearly helps in 1 of 3 site-tasks, makes no clear difference in none, hurts in 2."
        in text
    )
    assert (
        "chose on its validation rows, it clearly helps in 1 of 3 site-tasks, makes no clear difference in 2, hurts in none."
        in text
    )
    assert "1 of 3 keep the model trained alone." in text
    assert [one["gated_verdict"] for one in report_of(rows)["sites"]] == [
        "keeps its own model", "no clear difference", "15 % lower error",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_chosen_candidate_is_shown_with_its_figure_at_any_width(width: int, tmp_path: Path) -> None:
    found = {"local": 20.0, "federated": 17.0, "finetuned": 16.25, "fused": 16.125, "ensemble": 16.75}
    one = row(chosen="fused", gated=16.125, gated_interval=(-5.0, -3.0), candidates=found)
    report = report_of([("press-07", one)])
    text = printed(report, width)
    assert "fused" in text and "16.12" in text
    assert max(map(len, text.splitlines())) <= width
    assert ("finetuned 16.25" in text) == (width == 200)
    shown = Outline(page(tmp_path, report)).text
    assert all(f"{value:.2f}" in shown for value in found.values())


def test_a_report_of_a_version_without_candidates_still_reads(tmp_path: Path) -> None:
    report = report_of([("press-07", row())])
    for key in ("gated", "gated_interval", "gated_verdict", "candidates"):
        del report["sites"][0][key]
    del report["conflicts"]
    assert "clearly helps in 1 of 1" in printed(report, 120)
    assert "clearly helps in 1 of 1" in Outline(page(tmp_path, report)).text


def cosines(*rounds: dict[str, float]) -> list[dict[str, dict[str, float]]]:
    return [{"press-07": {f"conflict.{pair}": value for pair, value in one.items()}} for one in rounds]


def test_a_task_that_pulls_against_all_others_in_most_rounds_is_named() -> None:
    one = {"accumulator.pump": -0.3, "accumulator.valve": -0.2, "pump.valve": 0.4}
    [entry] = conflicts_of(cosines(one, one, {**one, "accumulator.pump": 0.1, "accumulator.valve": 0.1}))
    assert entry["tasks"] == ["accumulator", "pump", "valve"] and entry["rounds"] == 3
    assert entry["cosines"][0][1] == entry["cosines"][1][0] == pytest.approx((-0.3 - 0.3 + 0.1) / 3)
    assert entry["cosines"][1][2] == pytest.approx(0.4) and entry["cosines"][0][0] is None
    assert entry["split"] == ["accumulator"]
    words = "; ".join(sentences(entry))
    assert "help each other: pump and valve (+0.40)" in words and "try without accumulator" in words


def test_one_bad_round_or_a_cosine_near_zero_splits_nothing_off() -> None:
    wild = [{"a.b": -0.9}, {"a.b": 0.1}, {"a.b": 0.1}, {"a.b": 0.1}]
    assert conflicts_of(cosines(*wild))[0]["split"] == []  # -0.15 on average, and only once against
    assert conflicts_of(cosines({"a.b": -0.02}))[0]["split"] == []
    assert "neither help nor hinder" in sentences(conflicts_of(cosines({"a.b": -0.02}))[0])[0]
    assert conflicts_of([{"press-07": {"validation_loss": 1.0}}]) == []
    assert conflicts_of(cosines({"a.b": math.nan})) == []


def test_the_page_shows_who_helps_whom_and_who_shares_a_trunk(tmp_path: Path) -> None:
    metrics = {"press-07": {"conflict.rul.valve": -0.31, "rul.federated": 1.0}}
    report = report_of([("press-07", row())], [record(metrics=metrics)])
    assert "Cohorts" not in Outline(page(tmp_path, report)).text
    report["cohorts"] = {"press-07": 1, "kiln-02": 0, "mill-01": 1}
    text = Outline(page(tmp_path, report)).text
    assert "Do the tasks help each other?" in text and "-0.31" in text
    assert "mill-01, press-07" in text
    shown = " ".join(printed(report, 200).split())
    assert "Tasks at press-07: pull against each other: rul and valve (-0.31)" in shown
    assert "0: kiln-02; 1: mill-01, press-07" in shown


def test_colour_means_that_the_interval_excludes_zero() -> None:
    def shown(one: TaskRow) -> str:
        file = io.StringIO()
        print_report(
            report_of([("press-07", one)]), Console(file=file, width=120, force_terminal=True, color_system="standard")
        )
        return file.getvalue()

    green, red = "\x1b[32m", "\x1b[31m"
    assert green in shown(row())
    assert red in shown(row(federated=23.0, interval=(2.0, 4.0)))
    unclear = shown(row(interval=(-6.0, 0.5)))
    assert green not in unclear and red not in unclear


def test_a_cause_from_the_wire_cannot_steer_the_terminal_or_use_markup() -> None:
    refused = [Refusal("kiln-02", "\x1b[2Jgone [bold red]x[/]")]
    text = printed(report_of([("press-07", row())], [record(refused=refused)]), 120)
    assert "\x1b" not in text
    assert "[bold red]x[/]" in text


# --- the page ----------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Every tag, attribute and the visible text of a page; and whether its tags close in order."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_asks_nothing_of_the_outside(tmp_path: Path) -> None:
    text = page(tmp_path, report_of([("press-07", row())]), every_kind())
    found = Outline(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    references = [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert references and all(value.startswith("#") for value in references)
    assert "//" not in re.sub(r"/\*.*?\*/", "", text)  # no address of any scheme
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert found.open == []


def test_every_reference_inside_a_figure_points_at_one_element(tmp_path: Path) -> None:
    predictions = {(site, task): one for site in ("press-07", "kiln-02") for (_, task), one in every_kind().items()}
    found = Outline(page(tmp_path, report_of([("press-07", row()), ("kiln-02", row())]), predictions))
    names = [value for name, value in found.attributes if name == "id"]
    wanted = {value[1:] for name, value in found.attributes if name == "href"}
    wanted |= {match for _, value in found.attributes for match in re.findall(r"url\(#([^)]+)\)", value)}
    assert len(names) == len(set(names))
    assert wanted <= set(names)


def test_names_and_causes_are_text_and_never_markup(tmp_path: Path) -> None:
    nasty = "<b>press</b><script>alert('x')</script>"
    draw = np.linspace(0.0, 1.0, 20)
    report = report_of(
        [(nasty, row(unit="<i>$x$", more={"<u>": {"local": 1.0}}, candidates={"<u>": 2.0}))],
        [record(sites=[nasty], refused=[Refusal("<b>", "<img src=x>")], metrics={nasty: {"rul.federated": 1.0}})],
    )
    classes = Predictions(np.array(["<b>", "&"]), np.array(["<b>", "<b>"]), None, "", "multiclass")
    predictions = {(nasty, "rul"): Predictions(draw, draw, None, "<i>$x$", "regression"), (nasty, "<s>"): classes}
    found = Outline(page(tmp_path, report, predictions))
    assert not {"script", "img", "i", "u", "s"} & (set(found.tags) - {"i"})
    assert nasty in found.text
    assert "<img src=x>" in found.text
    assert "true (<i>$x$)" in found.text  # inside the figure too, where a unit with dollars is no formula


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    report = report_of([("press-07", row())])
    for name in ("one", "two"):
        write_report(report, tmp_path / name, every_kind())
    for file in ("report.json", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_run_without_baseline_or_rounds_or_rows_still_makes_a_page(tmp_path: Path) -> None:
    nothing = {"local": None, "federated": None, "interval": None}
    for rows in ([], [("press-07", row(local=None, interval=None))], [("press-07", row(**nothing))]):
        report = report_of(rows, [])
        text = Outline(page(tmp_path, report)).text
        assert "Nothing could be compared" in text
        assert "Nothing could be compared" in printed(report, 80)
        assert "Learning curves" not in text
        assert "Predicted and true" not in text


def test_words_in_any_script_and_times_nobody_knows_make_a_page_without_a_warning(tmp_path: Path) -> None:
    curves = {"press-07": {"rul.federated": 1e-12, "rul.local": 1e12}}
    rows = [("press-07", row(unit="温度 🏭", local=1e-9, federated=2e9, interval=(1.0, 2.0)))]
    report = report_of(rows, [record(seconds=math.nan, train_loss=math.inf, metrics=curves)])
    report["run"]["seconds"] = None
    classes = Predictions(np.array(["开", "关"]), np.array(["开", "开"]), None, "", "multiclass")
    assert "温度 🏭" in Outline(page(tmp_path, report, {("press-07", "阀"): classes})).text
    assert "温度" in printed(report, 80)


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass", "ordinal", "anomaly", "a later kind"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_handful_of_test_rows_is_enough_for_a_figure_and_none_for_none(tmp_path: Path, kind: str, n: int) -> None:
    ones = np.ones(n)
    one = Predictions(np.append(ones, np.nan), np.append(ones, 1.0), np.append(ones, 1.0), "", kind)
    text = page(tmp_path, report_of([("press-07", row())], []), {("press-07", "rul"): one})
    assert Outline(text).tags.count("figure") == (1 if n else 0)


def test_the_page_stays_small_however_many_rows_rounds_and_classes_there_are(tmp_path: Path) -> None:
    many = 20_000
    draw = np.random.default_rng(1)
    truth = draw.normal(size=many)
    labels = draw.integers(0, 60, many)
    predictions = {
        ("press-07", "rul"): Predictions(truth, truth + 1, truth - 1, "", "regression"),
        ("press-07", "b"): Predictions((truth > 0).astype(int), truth, truth + 1, "", "binary"),
        ("press-07", "c"): Predictions(labels, labels, labels, "", "multiclass"),
    }
    text = page(tmp_path, report_of([("press-07", row())], [record(n) for n in range(1, 2001)]), predictions)
    assert len(text) < 400_000
    assert text.count("<use ") < 2.5 * MOST_POINTS + 200  # two scatters and the axes' ticks
    assert "100 % right" in text and "other" in text


def test_the_area_under_the_curve_is_the_chance_to_rank_a_positive_above_a_negative(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    truth, score = draw.integers(0, 2, 80), draw.integers(0, 6, 80) / 5  # many ties
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth == 1] for b in score[truth == 0]]  # slow and obvious
    text = page(tmp_path, report_of([]), {("press-07", "b"): Predictions(truth, score, 1 - score, "", "binary")})
    assert f"ROC area {np.mean(pairs):.3f} federated, {1 - np.mean(pairs):.3f} alone" in Outline(text).text


def test_average_precision_is_that_of_the_library_with_ties() -> None:
    import torch
    from torchmetrics.functional.classification import binary_average_precision

    draw = np.random.default_rng(3)
    for _ in range(20):
        truth, score = draw.random(60) > 0.7, draw.integers(0, 9, 60) / 8
        expected = float(binary_average_precision(torch.tensor(score), torch.tensor(truth).long()))
        assert average_precision(truth, score) == pytest.approx(expected, abs=1e-6)


def test_a_band_that_holds_what_it_says_is_said_to(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    truth = draw.normal(size=(2000, 2))
    band = np.broadcast_to(np.array([-1.2816, 0.0, 1.2816]), (2000, 2, 3))  # the 10 % and 90 % points of a normal
    one = Predictions(truth, band, None, "kW", "forecast", quantiles=(0.1, 0.5, 0.9), horizons=(1, 24))
    text = Outline(page(tmp_path, report_of([]), {("press-07", "load"): one})).text
    found = re.search(r"the 80 % band holds (\d+) %", text)
    assert found and 77 <= int(found[1]) <= 83
    assert "24 rows ahead" in text


def test_alarms_are_counted_at_each_models_own_threshold(tmp_path: Path) -> None:
    truth, score = np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 4.0, 4.0, 2.0])
    one = Predictions(truth, score, score, "", "anomaly", thresholds={"federated": 3.0, "local": 0.5})
    assert "1 of 2 such rows detected, 1 false" in Outline(page(tmp_path, report_of([]), {("press-07", "x"): one})).text


def test_predictions_of_another_length_are_refused_with_both_shapes() -> None:
    with pytest.raises(DataError, match=r"local.*\(3,\).*\(4,\)"):
        Predictions(np.zeros(4), np.zeros(4), np.zeros(3), "", "regression")
    with pytest.raises(DataError, match=r"federated.*'forecast'.*3 axes.*\(4, 2\)"):
        Predictions(np.zeros((4, 2)), np.zeros((4, 2)), None, "", "forecast")
