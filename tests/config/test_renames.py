"""Older names of keys and words: they work for one version, cause one warning, and are refused beside the newer name."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from trunkline.client.policy.consent import check_terms
from trunkline.client.policy.contracts import Consent
from trunkline.config.renames import REFUSED_FROM, current, rename_overrides
from trunkline.config.run import RunConfig, parse_run, read_run, with_settings
from trunkline.config.site import SiteConfig, read_site, warn_of_older_names
from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, TrunklineDeprecation
from trunkline.protocol.messages import PROTOCOL, OfferRequest, open_stored_terms
from trunkline.simulations.search import search

RUN_KEYS = [
    ({"strategy": {"name": "cohorts"}}, {"strategy": {"name": "clustered"}}, ["`strategy.name`", "cohorts", "clustered"]),
    ({"training": {"hold": "local"}}, {"selection": {"default": "local"}}, ["training.hold", "selection.default"]),
    ({"world": {"hostile_share": 0.2}}, {"world": {"byzantine_share": 0.2}}, ["world.hostile_share", "byzantine_share"]),
    ({"world": {"hostile_sites": ["a"]}}, {"world": {"byzantine_sites": ["a"]}}, ["hostile_sites", "byzantine_sites"]),
    ({"world": {"lie": "scale"}}, {"world": {"attack": "scale"}}, ["`world.lie`", "`world.attack`"]),
]  # fmt: skip
SITE = """
name = "packer-01"
[data]
files = "*.csv"
channels = ["a", "b"]
[tasks.alarms]
kind = "multilabel"
targets = ["x", "y"]
highway = [["a", "b"]]
"""


def flat(table: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, inner in table.items() for key, value in inner.items()}


@pytest.mark.parametrize(("older", "newer", "words"), RUN_KEYS)
def test_an_older_key_of_run_toml_works_and_causes_one_warning(
    older: dict[str, Any], newer: dict[str, Any], words: list[str]
) -> None:
    with pytest.warns(TrunklineDeprecation) as caught:
        run = parse_run(older, "plant/run.toml")
    assert run == parse_run(newer, "plant/run.toml")
    assert len(caught) == 1
    for word in ("plant/run.toml", REFUSED_FROM, *words):
        assert word in str(caught[0].message)


@pytest.mark.parametrize(("older", "newer", "words"), RUN_KEYS)
def test_an_older_key_works_as_an_override(older: dict[str, Any], newer: dict[str, Any], words: list[str]) -> None:
    run = parse_run(newer, "run.toml")
    for overrides in (older, flat(older)):
        with pytest.warns(TrunklineDeprecation, match=r"run\.toml, override") as caught:
            assert parse_run({}, "run.toml", overrides) == run
        assert len(caught) == 1
    with pytest.warns(TrunklineDeprecation):
        assert with_settings(RunConfig(), flat(older), "[report] local") == run


@pytest.mark.parametrize(("older", "newer", "words"), [entry for entry in RUN_KEYS if "strategy" not in entry[0]])
def test_both_names_of_one_key_are_refused(older: dict[str, Any], newer: dict[str, Any], words: list[str]) -> None:
    (older_key,), (newer_key,) = flat(older), flat(newer)
    both = {name: {**older.get(name, {}), **newer.get(name, {})} for name in {**older, **newer}}
    for table, overrides in ((both, {}), ({}, {**flat(older), **flat(newer)}), ({}, {**flat(newer), **flat(older)})):
        with pytest.raises(ConfigError) as caught, warnings.catch_warnings(action="ignore"):
            parse_run(table, "run.toml", overrides)
        for word in ("run.toml", f"`{older_key}`", f"`{newer_key}`", "Remove"):
            assert word in str(caught.value)


def test_an_override_takes_the_place_of_the_older_key_in_the_file() -> None:
    with pytest.warns(TrunklineDeprecation):
        run = parse_run({"training": {"hold": "local"}}, "run.toml", {"selection.default": "ensemble"})
    assert run.selection.default == "ensemble"


def test_what_is_parsed_stays_as_it_was() -> None:
    table = {"training": {"hold": "local", "steps": 3}}
    with pytest.warns(TrunklineDeprecation):
        parse_run(table, "run.toml")
    assert table == {"training": {"hold": "local", "steps": 3}}


def test_a_mistake_in_place_of_a_table_is_named() -> None:
    with pytest.raises(ConfigError, match="`selection` is not a table; expected one with the key"):
        parse_run({"training": {"hold": "local"}, "selection": 3}, "run.toml")
    with pytest.raises(ConfigError, match="`training`"):
        parse_run({"training": "hold"}, "run.toml")


def test_an_older_key_of_site_toml_works_and_causes_one_warning(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    with pytest.warns(TrunklineDeprecation) as caught:
        site = read_site(tmp_path)
    assert site.tasks["alarms"].skip_channels == (("a", "b"),)
    (warning,) = caught
    for word in (str(tmp_path / "site.toml"), "`tasks.alarms.highway`", "`tasks.alarms.skip_channels`", REFUSED_FROM):
        assert word in str(warning.message)
    with pytest.warns(TrunklineDeprecation, match="tasks.alarms.skip_channels"):
        warn_of_older_names([tmp_path, tmp_path / "no such site"])
    (tmp_path / "site.toml").write_text(SITE + 'skip_channels = [["a", "b"]]\n')
    with pytest.raises(ConfigError, match=r"`tasks.alarms.highway` and `tasks.alarms.skip_channels`"):
        read_site(tmp_path)


def test_a_policy_that_allows_a_strategy_by_its_older_name_still_allows_it(tmp_path: Path) -> None:
    text = SITE.replace("highway", "skip_channels")
    (tmp_path / "site.toml").write_text(text + '[policy]\nstrategies = ["fedper", "cohorts"]\n')
    with pytest.warns(TrunklineDeprecation, match=r"`policy\.strategies`: 'cohorts' is now called 'clustered'"):
        assert read_site(tmp_path).policy.strategies == ("fedper", "clustered")
    (tmp_path / "site.toml").write_text(text)
    (tmp_path / "policy.toml").write_text('strategies = ["cohorts"]\n')
    with pytest.warns(TrunklineDeprecation, match=r"policy\.toml: `strategies`: 'cohorts'"):
        assert read_site(tmp_path).policy.strategies == ("clustered",)


def test_stored_settings_are_renamed_without_a_warning() -> None:
    stored = json.loads(RunConfig().model_dump_json())
    stored["training"]["hold"] = stored.pop("selection")["default"]
    for older, newer in (("hostile_share", "byzantine_share"), ("hostile_sites", "byzantine_sites"), ("lie", "attack")):
        stored["world"][older] = stored["world"].pop(newer)
    stored["strategy"]["name"] = "cohorts"
    expected = parse_run({"strategy": {"name": "clustered"}}, "run.toml")
    assert RunConfig.model_validate(current(RunConfig, stored)) == expected
    task = {"kind": "multilabel", "targets": ["x"], "highway": [["a"]]}
    assert TaskConfig.model_validate(current(TaskConfig, task)).skip_channels == (("a",),)


def test_a_model_without_older_names_is_left_alone() -> None:
    assert rename_overrides(TaskConfig, {"kind": "binary"}, "task") == {"kind": "binary"}
    assert current(SiteConfig, {"tasks": 3}) == {"tasks": 3}


def stored_terms() -> dict[str, Any]:
    """The terms of a run as a contract of protocol 3 has them."""
    request = OfferRequest.model_validate(
        {"run": "r", "seed": 0, "rounds": 2, "trunk": {}, "plan": {}, "lend": ["trunk"],
         "local_baseline": {"trunk": {}, "plan": {}}, "about": {"strategy": "clustered"}, "selection": {"default": "ensemble"}}
    )  # fmt: skip
    terms = json.loads(json.dumps(request.terms()))
    terms["protocol"] = 3
    terms["plan"]["hold"] = terms.pop("selection")["default"]
    terms["twin"] = terms.pop("local_baseline")
    terms["twin"]["plan"]["hold"] = "federated"
    terms["about"]["strategy"] = "cohorts"
    return dict(terms)


def test_a_contract_of_protocol_3_holds_for_the_same_run_and_for_no_other() -> None:
    terms = stored_terms()
    agreed = Consent(
        site="packer-01", run="r", terms=terms, arrays=(), once=(), metrics=(), tasks=(), inputs=None, report=True,
        verdict="accepted",
    )  # fmt: skip
    request = agreed.request
    assert (request.protocol, request.selection.default, request.about.strategy) == (PROTOCOL, "ensemble", "clustered")
    agreed = agreed.model_copy(update={"terms": request.terms()})
    check_terms("packer-01", request, agreed)
    other = open_stored_terms({**terms, "plan": {**terms["plan"], "hold": "local"}})
    with pytest.raises(Exception, match=r"`selection\.default` was \"ensemble\", is \"local\""):
        check_terms("packer-01", other, agreed)


def test_a_search_refuses_a_key_that_it_refused_under_its_older_name(tmp_path: Path) -> None:
    space = {"search": {"trials": 1, "space": {"training.hold": ["local"]}}}
    with (
        pytest.warns(TrunklineDeprecation, match=r"\[search\] space"),
        pytest.raises(ConfigError, match=r"`selection\.default` cannot be searched"),
    ):
        search(parse_run(space, "run.toml"), None, [], tmp_path, lambda event: None)  # type: ignore[arg-type]


def test_reading_a_run_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[strategy]\nname = "cohorts"\n')
    with pytest.warns(TrunklineDeprecation, match=str(tmp_path / "run.toml")):
        assert read_run(tmp_path / "run.toml").strategy.name == "clustered"
