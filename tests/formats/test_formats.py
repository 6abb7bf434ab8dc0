"""What any released Trunkline has put on a disk, this one opens; `make.py` says how the samples were made."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trunkline
from tests.formats.make import KEY, ROUND, SEALED_WITH, SETTINGS, sites
from tests.loopback import QUICK, WatchedGrid, federate, trunk_of
from trunkline.client.adaptation.model_file import read_model
from trunkline.client.policy.consent import check_terms
from trunkline.client.policy.contracts import every, read, write
from trunkline.client.policy.manifest import read_manifest
from trunkline.client.site import open_site
from trunkline.client.state.vault import Vault
from trunkline.errors import ConfigError, ContractError
from trunkline.flower.app_archive import app_digest
from trunkline.protocol.messages import (
    PROTOCOL,
    REQUESTS,
    Offer,
    Reply,
    Scorecard,
    open_stored_terms,
    open_stored_training,
    parse_request,
)
from trunkline.release import open_release
from trunkline.runtime.storage import FORMAT, MAGIC, is_sealed
from trunkline.security.keys import read_certificate
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.authority import Authority
from trunkline.server.operations.backup import restore
from trunkline.server.operations.run_store import RunStore
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.simulations.search import read_search

HERE = Path(__file__).parent
# file of the package that has a format number -> where the sample of each lies; {} is the number
SAMPLES = {
    "runtime/storage.py": ("v{}/run/checkpoint/round-000001.safetensors", "v{}/plant/vault"),
    "release.py": ("v{}/trunk.safetensors",),
    "client/adaptation/model_file.py": ("v{}/model.safetensors",),
    "client/data/split.py": ("v{}/plant/split.json",),
    "simulations/search.py": ("v{}/search.json",),
    "server/membership/registry.py": ("v{}/centre/registry.json",),
    "server/operations/backup.py": ("v{}/backup.tar",),
    "server/operations/run_store.py": ("v{}/centre/runs",),
}
SHELVES = range(1, FORMAT + 1)


def formats() -> dict[str, int]:
    """Every file of the package that has a format, with its number: FORMAT = 2, or a field `format: int = 1`."""
    found = {}
    root = Path(trunkline.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                if (
                    isinstance(target, ast.Name)
                    and target.id.lower().endswith("format")
                    and type(node.value.value) is int
                ):
                    found[path.relative_to(root).as_posix()] = node.value.value
    return found


def test_every_format_number_has_a_sample() -> None:
    found = formats()
    assert set(found) == set(SAMPLES), "a format without samples: make one (tests/formats/make.py), and list it above"
    for file, newest in found.items():
        for number in range(1, newest + 1):
            for place in SAMPLES[file]:
                assert (HERE / place.format(number)).exists(), f"{file}: no sample of format {number}"
    for kind in REQUESTS:
        assert (HERE / "wire" / f"v{PROTOCOL}" / f"{kind}_request.json").exists()
    assert MAGIC[-1] == 1, "sealed files have another format: their samples are those in v1/plant"


@pytest.fixture(scope="module")
def site_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites(tmp_path_factory.mktemp("sites"))[0]


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(KEY, SEALED_WITH)
    yield


def copied(place: str, to: Path) -> Path:
    """A sample as it lay at a plant: for this account only, which a repository does not remember."""
    shutil.copytree(HERE / place, to)
    for path in (to, *to.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return to


@pytest.mark.parametrize("number", SHELVES)
def test_a_run_that_an_older_trunkline_began_goes_on_and_is_kept_in_the_newest_format(
    number: int, site_dir: Path, tmp_path: Path
) -> None:
    out = copied(f"v{number}/run", tmp_path / "out")
    began = trunk_of(out).digest()
    federate([site_dir], out, resume=True, grid=WatchedGrid([site_dir], out), **SETTINGS)
    shelf = Checkpoint(out).shelf
    assert shelf.rounds() == [0, 1, 2]
    assert trunk_of(out).digest() != began
    state, meta = Checkpoint(out).load() or pytest.fail("nothing to load")
    assert (state.round, meta["records"][0]["round"]) == (2, 1)
    (run,) = (out / "state" / site_dir.name / "vault").iterdir()
    assert run.name == meta["key"], "it went on as the run it was"
    for path, kind, owner in (
        (shelf.path(2), "checkpoint", run.name),
        (run / shelf.path(2).name, "vault", site_dir.name),
    ):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert (header["format"], header["kind"], header["owner"]) == (FORMAT, kind, owner)


@pytest.mark.parametrize("number", SHELVES)
def test_the_sealed_state_of_a_plant_opens_with_all_that_is_in_it(
    number: int, site_dir: Path, tmp_path: Path, key: None
) -> None:
    state = copied(f"v{number}/plant", tmp_path / "state")
    site = open_site({"site": str(site_dir), "state": str(state), "plant": True})
    (agreed,) = every(state)
    (file,) = (state / "vault" / agreed.run).iterdir()
    assert is_sealed(file.read_bytes())
    entry = Vault(state, agreed.run, pytest.fail, site.seal, site.name).answered(ROUND, question_of(state, agreed.run))
    assert entry is not None
    assert {name.split(".")[0] for name in entry.delta} == {"trunk", "stem", "head"}
    assert all(np.isfinite(array).all() for array in entry.delta.values())
    links, _ = read_manifest(state)
    assert [link.body["kind"] for link in links] == ["offer", "update"]
    check_terms(site.name, agreed.request, agreed)


def question_of(state: Path, run: str) -> str:
    from trunkline.security.encryption import find_seal

    return str(Vault(state, run, seal=find_seal(state)).shelf.get(ROUND)[1]["question"])


def test_a_contract_from_before_a_key_was_known_holds_for_a_run_that_has_it_as_it_is_by_default(
    tmp_path: Path, key: None
) -> None:
    state = copied("v1/plant", tmp_path / "state")
    (agreed,) = every(state)
    older = {name: value for name, value in agreed.terms.items() if name not in ("local_baseline", "weight_cap")}
    write(state, agreed.model_copy(update={"terms": older}))
    check_terms("kiln-02", agreed.request, read(state, agreed.run))


def test_settings_from_before_a_key_was_known_are_those_of_a_run_file_without_it(
    site_dir: Path, tmp_path: Path
) -> None:
    out = copied("v1/run", tmp_path / "out")
    checkpoint = Checkpoint(out)
    state, meta = checkpoint.load() or pytest.fail("nothing to load")
    config = json.loads(meta["config"])
    del config["guards"], config["cohort"]["weight_cap"]
    checkpoint.save(state, {**meta, "config": json.dumps(config)})
    federate([site_dir], out, resume=True, **SETTINGS)
    with pytest.raises(ConfigError, match=r"another run\.toml \(different: cohort\)"):
        federate([site_dir], out, resume=True, **{**SETTINGS, "cohort": {**QUICK["cohort"], "weight_cap": 7}})


def test_the_state_of_a_centre_opens(tmp_path: Path, key: None) -> None:
    state = copied("v1/centre", tmp_path / "state")
    opened = Authority.open(state)
    assert opened.federation.name == "Samples"
    assert [one.site for one in opened.registry.read().invitations] == ["kiln-02"]
    assert [link.body["what"] for link in audit.read(state)] == ["init", "invite"]
    (entry,) = RunStore(state).records()
    assert (entry.name, entry.state, entry.out) == ("quick", "wanted", "/srv/runs/quick")


def test_a_backup_is_put_back(tmp_path: Path, key: None) -> None:
    restore(HERE / "v1" / "backup.tar", tmp_path / "state")
    assert Authority.open(tmp_path / "state").federation.name == "Samples"
    (entry,) = RunStore(tmp_path / "state").records()
    assert Path(entry.out) == tmp_path / "state" / "runs" / entry.key


def test_releases_open_and_a_signed_one_is_still_signed(tmp_path: Path) -> None:
    authority = read_certificate(HERE / "v1" / "centre" / "authority.crt")
    first = open_release(HERE / "v1" / "trunk.safetensors", authority)
    assert first.card.trunk.width == 4
    assert "of format 1, which nobody could sign" in first.verdict.text
    second = open_release(HERE / "v2" / "trunk.safetensors", authority)
    assert second.verdict.right, second.verdict.text
    assert second.card.sites == ("kiln-02",)


def test_a_stored_model_and_a_stored_search_open() -> None:
    assert read_model(HERE / "v1" / "model.safetensors").model is not None
    found = read_search(HERE / "v1")
    assert found is not None
    assert len(found.trials) == 2


def test_plants_of_older_versions_answer_for_the_app_that_runs_are_submitted_with() -> None:
    known = (HERE / "wire" / f"v{PROTOCOL}" / "app.sha256").read_text().strip()
    assert app_digest(Path(trunkline.__file__).parent / "app") == known, (
        "every plant that is out there refuses this app as one that is not pinned: raise PROTOCOL if that is meant"
    )


def test_headers_of_this_protocol_read_as_they_were_sent() -> None:
    folder = HERE / "wire" / f"v{PROTOCOL}"
    for name, kind in (("offer", Offer), ("reply", Reply), ("scorecard", Scorecard)):
        text = (folder / f"{name}.json").read_text()
        assert holds(kind.model_validate_json(text).model_dump(mode="json"), json.loads(text)), name
    for name, kind in REQUESTS.items():
        text = (folder / f"{name}_request.json").read_text()
        request = parse_request(text)
        assert type(request) is kind
        assert holds(request.model_dump(mode="json"), json.loads(text)), name


def test_a_contract_that_was_accepted_under_protocol_3_is_not_asked_again(tmp_path: Path, key: None) -> None:
    """Protocol 3 wrote the terms of a run with its own number, and called `local_baseline` `twin`."""
    state = copied("v1/plant", tmp_path / "state")
    (agreed,) = every(state)
    order = json.loads((HERE / "wire" / "v3" / "order.json").read_text())
    moving = ("round", "contract", "probe", "decide", "passed", "conditions")
    older = {name: value for name, value in order.items() if name not in moving}
    older["twin"] = {"trunk": order["trunk"], "plan": {**order["plan"], "steps": 7}}
    write(state, agreed.model_copy(update={"run": order["run"], "terms": older}))
    found = read(state, order["run"]) or pytest.fail("nothing to read")
    baseline = found.request.local_baseline
    assert baseline is not None and baseline.plan.steps == 7
    asked = found.request.model_copy(update={"protocol": PROTOCOL})
    check_terms("kiln-02", asked, found)
    assert found.terms == asked.terms() == open_stored_terms(older).terms()
    with pytest.raises(ContractError, match="`local_baseline` was"):
        check_terms("kiln-02", asked.model_copy(update={"local_baseline": None}), found)


def test_a_question_that_was_stored_under_protocol_3_can_be_trained_again() -> None:
    text = (HERE / "wire" / "v3" / "order.json").read_text()
    request, order = open_stored_training(text), json.loads(text)
    assert request.protocol == PROTOCOL
    assert (request.round, request.contract, request.lend) == (order["round"], order["contract"], tuple(order["lend"]))
    assert open_stored_training(request.model_dump_json()) == request


def holds(now: object, then: object) -> bool:
    """Whether all that was said then is said now: a key that came later may be beside it."""
    if isinstance(now, dict) and isinstance(then, dict):
        return all(name in now and holds(now[name], one) for name, one in then.items())
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(holds, now, then))
    return now == then
