"""What a plant keeps of its runs, encrypted: real sites train with it, and nothing of it can be read, swapped or lost."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

import trunkline.runtime.storage
import trunkline.security.encryption
from tests.loopback import federate, trunk_of
from tests.typed_requests import as_kind, request_of
from trunkline.cli.app import app
from trunkline.client.handlers import answer_offer, answer_score, answer_train
from trunkline.client.site import Site, open_site
from trunkline.client.state import at_rest, rekeying
from trunkline.client.state.at_rest import Kept, kept, open_copy, seal_state, status
from trunkline.client.state.identity import records_key
from trunkline.client.state.permissions import open_seal
from trunkline.client.state.rekeying import rekey
from trunkline.client.state.vault import Entry, Vault
from trunkline.config.site import read_site
from trunkline.errors import DeploymentError, StorageError, TrustError
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import ScoreRequest
from trunkline.protocol.plan import LocalPlan, TrunkSpec
from trunkline.runtime.lock import Lock
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import (
    SETTINGS,
    Seal,
    find_seal,
    is_sealed,
    key_name,
    make_seal,
    read_keys,
    write_keys,
    write_settings,
)
from trunkline.security.hash_chain import Chain
from trunkline.server.reporting.report import read_report

pytestmark = pytest.mark.xdist_group("vault at rest")  # one worker: the two runs are made once
RUN: dict[str, Any] = {"rounds": 2, "refit": True, "report": {"baseline": True}}
SPEC = TrunkSpec(width=8)


def files(state: Path) -> dict[str, bytes]:
    return {str(path.relative_to(state)): path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file()}


def names(state: Path) -> set[str]:
    """Of files, but for what a lock leaves."""
    return set(files(state)) - {"pid"}


def key_of(folder: Path) -> str:
    return f"file:{folder / 'keys' / 'key'}"


# --- real sites, whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    federate(plants, out, **RUN)
    return out


@pytest.fixture(scope="module")
def sealed(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    for plant in plants:
        make_seal(folder / "out" / "state" / plant.name, f"file:{folder / 'keys' / plant.name}")
    federate(plants, folder / "out", **RUN)
    return folder / "out"


def test_a_sealed_state_changes_no_bit_of_what_is_learnt(plain: Path, sealed: Path) -> None:
    assert trunk_of(sealed).digest() == trunk_of(plain).digest()
    assert read_report(sealed)["sites"] == read_report(plain)["sites"]


def tensors_of(state: Path) -> list[bytes]:
    """Stems, heads, twins: all that is private in the newest round of each run."""
    seal, found = find_seal(state), []
    for run in (state / "vault").iterdir():
        newest = Vault(state, run.name, seal=seal).shelf.newest()
        assert newest is not None
        private = [array for name, array in newest[1].items() if not name.startswith("delta/")]
        found += [array.tobytes() for array in private if array.nbytes >= 16 and array.any()]
    return found


def test_no_tensor_column_or_task_can_be_read_in_a_sealed_state(plants: list[Path], plain: Path, sealed: Path) -> None:
    looked = 0
    for plant in plants:
        config = read_site(plant)
        secret, clear = (b"\n".join(files(out / "state" / plant.name).values()) for out in (sealed, plain))
        groups = json.loads((plain / "state" / plant.name / "split.json").read_bytes())["assignment"]
        words = [f'"{task}"'.encode() for task in config.tasks]
        words += [f'"{group}": "{part}"'.encode() for group, part in groups.items()]
        needles = [*tensors_of(sealed / "state" / plant.name), *words]
        assert all(needle in clear for needle in needles)  # so the search would find them
        columns = [column.encode() for column in config.data.channels if len(column) > 5]
        assert columns
        assert not [needle for needle in (*needles, *columns) if needle in secret]
        assert {*config.tasks} <= {Path(name).stem for name in files(plain / "state" / plant.name)}
        assert not {*config.tasks} & {Path(name).stem for name in files(sealed / "state" / plant.name)}
        looked += len(needles)
    assert looked > 100


def test_everything_kept_of_a_run_is_sealed_but_seal_toml(plants: list[Path], plain: Path, sealed: Path) -> None:
    for plant in plants:
        state = sealed / "state" / plant.name
        assert {name for name, data in files(state).items() if not is_sealed(data)} == {SETTINGS}
        assert len(names(state)) == len(names(plain / "state" / plant.name)) + 1
        assert {path.stat().st_mode & 0o777 for path in state.rglob("*")} == {0o600, 0o700}
        found = status(state)
        assert (found.problem, list(found.files), found.lines) == ("", [found.key], {})
        ((_, (rounds, size)),) = found.runs.items()
        assert len(rounds) == 3
        assert size > 1000


def test_a_simulated_site_has_no_seal_and_its_files_are_as_ever(plants: list[Path], plain: Path) -> None:
    for plant in plants:
        state = plain / "state" / plant.name
        site = open_site({"site": str(plant), "state": str(state)})
        assert site.seal is None
        assert not [name for name, data in files(state).items() if is_sealed(data)]
        for path in state.rglob("*.safetensors"):
            if path.parent.parent.name == "evaluation":
                assert safetensors.numpy.load(path.read_bytes())


# --- one site, round by round ----------------------------------------------------------------------------------------


def order_of(round: int, **changes: object) -> Any:
    plan = LocalPlan(steps=2, batch_size=16)
    request = request_of(round, run="r", seed=1, rounds=3, trunk=SPEC, plan=plan, lend=("trunk",))
    return request.model_copy(update=changes)


@pytest.fixture(scope="module")
def lived(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain `state` after two rounds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lived")
    site = open_site({"site": str(plants[0]), "state": str(folder / "state")})
    answer_offer(site, order_of(0))
    for round in (1, 2):
        answer_train(site, order_of(round), first_trunk(SPEC, 1))
    return folder


@pytest.fixture
def state(lived: Path, plants: list[Path], tmp_path: Path) -> Path:
    """A sealed copy of it."""
    shutil.copytree(lived / "state", tmp_path / "state")
    seal_state(tmp_path / "state", key_of(tmp_path), tuple(read_site(plants[0]).tasks))
    return tmp_path / "state"


def opened(plants: list[Path], state: Path) -> Site:
    return open_site({"site": str(plants[0]), "state": str(state)})


def test_a_state_that_is_sealed_between_two_rounds_goes_on_to_the_same_bytes(
    lived: Path, plants: list[Path], state: Path, tmp_path: Path
) -> None:
    shutil.copytree(lived / "state", tmp_path / "twin")
    _, before = answer_train(opened(plants, tmp_path / "twin"), order_of(3), first_trunk(SPEC, 1))
    _, after = answer_train(opened(plants, state), order_of(3), first_trunk(SPEC, 1))
    assert after.delta.digest() == before.delta.digest()
    _, again = answer_train(opened(plants, state), order_of(3), first_trunk(SPEC, 1))
    assert again.delta.digest() == before.delta.digest()
    assert not [name for name, data in files(state).items() if not is_sealed(data) and name not in (SETTINGS, "pid")]


def test_a_wrong_key_is_named_and_nothing_is_trained_or_written(
    plants: list[Path], state: Path, tmp_path: Path
) -> None:
    site = opened(plants, state)
    before = files(state)
    wrong = Seal((b"w" * 32,), "env:K")
    site = Site(site.folder, state, site.data, wrong)
    trunk = first_trunk(SPEC, 1)
    for ask in (
        lambda: answer_train(site, order_of(3), trunk),
        lambda: answer_train(site, order_of(2), trunk),  # once answered
        lambda: answer_score(site, as_kind(ScoreRequest, order_of(4)), trunk),
        lambda: Vault(state, "r", seal=wrong).before(3),
    ):
        with pytest.raises(TrustError, match=rf"{wrong.name}.*Nothing was changed"):
            ask()
    assert files(state) == before
    (tmp_path / "keys" / "key").write_text(base64.b64encode(wrong.keys[0]).decode())
    moved = state.rename(tmp_path / "moved")  # a site is read once a process
    with pytest.raises(TrustError, match=rf"holds key {wrong.name}.*Nothing was changed"):
        opened(plants, moved)
    write_settings(moved, Seal(wrong.keys, key_of(tmp_path)))  # even where seal.toml was made to fit it
    with pytest.raises(TrustError, match=r"split\.json: sealed with key"):
        opened(plants, moved)
    assert {name: data for name, data in files(moved).items() if name != SETTINGS} == {
        name: data for name, data in before.items() if name != SETTINGS
    }


def test_a_key_that_is_gone_stops_the_site_before_it_starts(plants: list[Path], state: Path, tmp_path: Path) -> None:
    (tmp_path / "keys" / "key").unlink()
    before = files(state)
    with pytest.raises(TrustError, match="the key file is gone"):
        opened(plants, state)
    assert files(state) == before


def test_a_seal_toml_that_is_gone_does_not_make_a_site_start_afresh(plants: list[Path], state: Path) -> None:
    (state / SETTINGS).unlink()
    before = files(state)
    with pytest.raises(TrustError, match=r"Restore a backup of seal\.toml"):
        opened(plants, state)
    vault = Vault(state, "r")
    for ask in (lambda: vault.before(3), lambda: vault.answered(2, "q")):
        with pytest.raises(TrustError, match=r"seal\.toml"):
            ask()
    assert files(state) == before


def test_a_damaged_version_is_passed_over_as_ever(plants: list[Path], state: Path) -> None:
    site = opened(plants, state)
    shelf = Vault(state, "r", seal=site.seal).shelf
    data = bytearray(shelf.path(2).read_bytes())
    data[len(data) // 2] ^= 1
    shelf.path(2).write_bytes(data)
    told: list[str] = []
    found = Vault(state, "r", told.append, site.seal).before(3)
    first = Vault(state, "r", seal=site.seal).before(2)
    assert found is not None
    assert first is not None
    assert found.question == first.question
    assert "Going back to round 1" in told[0]


@pytest.mark.parametrize("name", ["vault/r/round-000002.safetensors", "split.json"])
def test_a_plain_file_among_sealed_ones_is_refused_with_what_to_do(
    lived: Path, plants: list[Path], state: Path, name: str
) -> None:
    shutil.copyfile(lived / "state" / name, state / name)
    before = files(state)
    with pytest.raises(TrustError, match="`trunkline client vault seal SITE_DIR`"):
        answer_train(opened(plants, state), order_of(3), first_trunk(SPEC, 1))
    assert files(state) == before
    seal_state(state)
    answer_train(opened(plants, state), order_of(3), first_trunk(SPEC, 1))


def test_decisions_are_sealed_and_of_their_run(state: Path) -> None:
    seal = find_seal(state)
    Vault(state, "r", seal=seal).keep_decisions("q", {"planned": {"local": 2}})
    assert Vault(state, "r", seal=seal).decisions("q") == {"question": "q", "planned": {"local": 2}}
    (state / "vault" / "s").mkdir()
    (state / "vault" / "r" / "decisions.json").rename(state / "vault" / "s" / "decisions.json")
    with pytest.raises(StorageError, match="moved"):
        Vault(state, "s", seal=seal).decisions()
    with pytest.raises(TrustError):
        Vault(state, "s", seal=Seal((b"w" * 32,), "x")).decisions()


# --- who may reach it ------------------------------------------------------------------------------------------------


def places(state: Path) -> dict[str, Path]:
    keys = Path(state.parent / "keys")
    return {"state": state, "entry": state / "vault" / "r" / "round-000001.safetensors", "settings": state / SETTINGS,
            "key": keys / "key", "keys": keys}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "mode", "remedy"),
    [
        ("state", 0o750, "chmod 700"),
        ("state", 0o701, "chmod 700"),
        ("state", 0o720, "chmod 700"),
        ("entry", 0o640, "chmod 600"),
        ("entry", 0o602, "chmod 600"),
        ("settings", 0o644, "chmod 600"),
        ("key", 0o640, "chmod 600"),
        ("keys", 0o770, "chmod go-w"),
        ("keys", 0o777, "chmod go-w"),
    ],
)
def test_what_other_accounts_can_reach_is_refused_until_it_is_mended(
    plants: list[Path], state: Path, what: str, mode: int, remedy: str
) -> None:
    path = places(state)[what]
    right = path.stat().st_mode & 0o777
    path.chmod(mode)
    before = files(state)
    with pytest.raises(TrustError) as caught:
        opened(plants, state)
    assert f"`{remedy} {path}`" in str(caught.value)
    assert files(state) == before
    path.chmod(right)
    opened(plants, state)


def test_several_files_are_mended_by_one_command(state: Path) -> None:
    for path in (state / "vault" / "r").iterdir():
        path.chmod(0o644)
    with pytest.raises(TrustError, match=rf"1 more: `chmod -R go-rwx {state}`"):
        open_seal(state)


def test_a_parent_folder_that_everybody_writes_in_is_told(state: Path) -> None:
    told: list[str] = []
    for mode, words in ((0o777, "chmod o-w"), (0o1777, ""), (0o755, "")):
        state.parent.chmod(mode)
        open_seal(state, told.append)
        assert bool(told) == bool(words)
        assert all(words in text for text in told)
        told.clear()


def test_logs_of_flower_are_not_asked_to_be_ours(state: Path) -> None:
    for name in ("logs", "flwr"):
        (state / name).mkdir(mode=0o755)
        (state / name / "x.log").write_text("x")
        (state / name / "x.log").chmod(0o644)
    assert open_seal(state) is not None


# --- a new key, and sealing what is plain ------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception, so that nothing in the code under test can catch it."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """`cut(n, after)`: the process is killed at its n-th write from now on, before or after it took effect; 0: never."""
    left = [0, False]

    def write(path: Path, data: bytes, mode: int = 0o600) -> None:
        left[0] -= 1
        if left[0] == 0 and not left[1]:
            raise Killed
        write_atomic(path, data, mode)
        if left[0] == 0:
            raise Killed

    for module in (trunkline.runtime.storage, trunkline.security.encryption, rekeying, at_rest):
        monkeypatch.setattr(module, "write_atomic", write)

    def at(number: int, after: bool) -> None:
        left[:] = [number, after]

    return at


def furnish(state: Path, seal: Seal | None) -> None:
    """One of everything that a state holds, without a model."""
    rng = np.random.default_rng(0)
    for run in ("r", "s"):
        vault = Vault(state, run, seal=seal)
        for round in (1, 2, 3):
            weights = {"w": rng.normal(size=20).astype(np.float32)}
            vault.put(round, Entry("q", weights, weights, delta=Arrays(weights)))
        vault.keep_decisions("q", {"planned": {}})
    for place in ("split.json", "adapted/model.safetensors", "adapted/evidence.json", "evaluation/r/rul.safetensors"):
        trunkline.runtime.storage.write_private(state / place, place.encode(), seal, place)
    records_key(state, seal)


def contents(state: Path) -> dict[str, bytes]:
    """Place -> what every private file says, opened."""
    seal = find_seal(state)
    assert seal is not None
    found = {}
    for one in kept(state):
        data = one.path.read_bytes()
        found[one.place] = seal.open(data, one.about, one.place) if one.key else data
    return found


def attempts(
    make: Callable[[], Path], act: Callable[[Path], object], cut: Callable[[int, bool], None]
) -> Iterator[Path]:
    """States after `act` was killed at its first write, its second, and so on; the last one it was not."""
    for after in (False, True):
        for number in range(1, 100):
            state = make()
            cut(number, after)
            try:
                act(state)
            except Killed:
                yield state
                continue
            finally:
                cut(0, False)
            assert number > 8
            yield state
            break


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    count = iter(range(1000))

    def make() -> Path:
        folder = tmp_path / str(next(count))
        seal = make_seal(folder / "state", key_of(folder))
        furnish(folder / "state", seal)
        return folder / "state"

    return make


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same source", "another source"])
def test_a_change_of_key_that_is_killed_at_any_write_loses_nothing_and_goes_on(
    fresh: Callable[[], Path], cut: Callable[[int, bool], None], elsewhere: bool
) -> None:
    def act(state: Path) -> object:
        return rekey(state, f"file:{state.parent / 'new'}" if elsewhere else None, forget=True)

    first = fresh()
    seen, before = 0, contents(first)
    old = find_seal(first)
    assert old is not None
    for state in attempts(fresh, act, cut):
        seen += 1
        found = contents(state)
        assert found.keys() == before.keys()
        found.pop("identity/records.key")  # of each state its own
        assert found == {name: data for name, data in before.items() if name != "identity/records.key"}
        signer = records_key(state, find_seal(state)).private_bytes_raw()
        vault = Vault(state, "r", seal=find_seal(state))
        vault.put(4, Entry("q", {}, {}))  # a site that goes on in between
        told: list[str] = []
        keys_now = list(read_keys(key_of(state.parent)))
        seal = rekey(state, f"file:{state.parent / 'new'}" if elsewhere else None, forget=True, tell=told.append)
        assert find_seal(state) == seal
        assert {one.key for one in kept(state)} == {seal.name}
        assert read_keys(seal.source) == seal.keys == seal.keys[:1]
        assert elsewhere == (seal.source != key_of(state.parent))
        assert elsewhere == (list(read_keys(key_of(state.parent))) == keys_now)  # the old source is not touched
        assert records_key(state, seal).private_bytes_raw() == signer
        assert contents(state)["vault/r/round-000003.safetensors"] == before["vault/r/round-000003.safetensors"]
    assert seen > 30


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same source", "another source"])
def test_an_interrupted_change_of_key_goes_on_with_the_key_it_began(
    fresh: Callable[[], Path], cut: Callable[[int, bool], None], elsewhere: bool
) -> None:
    state = fresh()
    source = f"file:{state.parent / 'new'}" if elsewhere else key_of(state.parent)
    cut(5, False)
    with pytest.raises(Killed):
        rekey(state, source)
    cut(0, False)
    begun = read_keys(source)[0]
    told: list[str] = []
    assert rekey(state, tell=told.append).keys[0] == begun
    assert "Going on" in told[0]
    assert rekey(state).keys[0] != begun


def test_keys_that_a_chain_needs_stay_and_all_others_go(fresh: Callable[[], Path]) -> None:
    state = fresh()
    signer = records_key(state, find_seal(state))
    generations = []
    for round in range(4):
        seal = find_seal(state)
        assert seal is not None
        generations.append(seal.name)
        if round % 2 == 0:
            Chain(state / "manifest.jsonl", "manifest", seal).append(signer, {"round": round})
        rekey(state, forget=True)
    told: list[str] = []
    seal = rekey(state, forget=True, tell=told.append)
    assert [key_name(key) for key in seal.keys] == [seal.name, generations[2], generations[0]]
    assert f"Older keys that stay in {seal.source}" in " ".join(told)
    lines = Chain(state / "manifest.jsonl", "manifest", find_seal(state)).read(signer.public_key())
    assert [link.body["round"] for link in lines] == [0, 2]
    found = status(state)
    assert found.lines == {"manifest.jsonl": {generations[0]: 1, generations[2]: 1}}
    assert found.needed() == {seal.name, generations[0], generations[2]}


def test_a_source_that_others_may_use_keeps_its_keys_unless_told_to_forget(fresh: Callable[[], Path]) -> None:
    state, other = fresh(), fresh()
    shared = key_of(state.parent)
    rekey(other, shared)
    told: list[str] = []
    rekey(state, tell=told.append)
    assert contents(other)
    assert "--forget" in told[-1]


def test_the_default_source_is_a_folders_own_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    furnish(tmp_path / "state", make_seal(tmp_path / "state"))
    seal = rekey(tmp_path / "state")
    assert read_keys(seal.source) == seal.keys == seal.keys[:1]
    assert contents(tmp_path / "state")


def test_a_key_in_the_environment_is_changed_by_who_sets_it(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = fresh()
    before = contents(state)
    for _ in range(2):  # from a file to the environment, and within it
        with pytest.raises(TrustError, match="Set it to the following") as caught:
            rekey(state, "env:K")
        assert contents(state) == before
        words = str(caught.value).rpartition(": ")[2]
        monkeypatch.setenv("K", words)
        told: list[str] = []
        seal = rekey(state, "env:K", tell=told.append)
        assert seal.source == "env:K"
        assert {one.key for one in kept(state)} == {seal.name}
        assert "take it out of env:K" in " ".join(told)
        monkeypatch.setenv("K", words.split()[0])
        assert contents(state) == before


def test_a_damaged_file_is_left_and_its_key_stays(fresh: Callable[[], Path]) -> None:
    state = fresh()
    path = state / "adapted" / "evidence.json"
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    old = find_seal(state)
    assert old is not None
    told: list[str] = []
    seal = rekey(state, forget=True, tell=told.append)
    assert any(f"Left as it is: {path}" in text for text in told)
    assert path.read_bytes() == damaged
    assert [key_name(key) for key in seal.keys] == [seal.name, old.name]


def test_sealing_that_is_killed_at_any_write_loses_nothing_and_goes_on(
    tmp_path: Path, cut: Callable[[int, bool], None]
) -> None:
    count = iter(range(1000))

    def make() -> Path:
        state = tmp_path / str(next(count)) / "state"
        furnish(state, None)
        (state / "vault" / "r" / ".round-000004.safetensors.17.tmp").write_bytes(b"a write that was killed")
        return state

    tasks = ("failing", "rul")
    for state in attempts(make, lambda state: seal_state(state, key_of(state.parent), tasks), cut):
        seal_state(state, key_of(state.parent), tasks)
        plain = make()
        want = {one.place: one.path.read_bytes() for one in kept(plain)}
        want["evaluation/r/task-01.safetensors"] = want.pop("evaluation/r/rul.safetensors")
        found = contents(state)
        for one in (want, found):
            assert one.pop("identity/records.key").startswith(b"-----BEGIN PRIVATE KEY")
        assert found == want
        assert all(one.key for one in kept(state))
        assert not list(state.rglob("*.tmp"))
        assert {path.stat().st_mode & 0o077 for path in state.rglob("*")} == {0}


def test_a_running_daemon_is_not_pulled_its_vault_from_under(fresh: Callable[[], Path], lived: Path) -> None:
    state = fresh()
    before = files(state)
    with Lock(state):
        for act in (seal_state, rekey):
            with pytest.raises(DeploymentError, match=f"pid {os.getpid()} already runs"):
                act(state)
    assert {name: data for name, data in files(state).items() if name != "pid"} == before


# --- a copy for the plant's own use, and the commands ------------------------------------------------------------------


def test_a_decrypted_copy_holds_the_very_tensors(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    open_copy(state, out, run="r", round=1)
    want = Vault(state, "r", seal=find_seal(state)).shelf.get(1)[0]
    found = safetensors.numpy.load(out.read_bytes())
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])
    assert out.stat().st_mode & 0o777 == 0o600
    for arguments, words in (
        ({"run": "r", "round": 1}, "exists already"),
        ({"run": "x"}, r"no such run here; runs: r\."),
        ({"run": "r", "round": 7}, r"no round 7 here; rounds 1, 2 of it are kept"),
        ({"file": "nothing"}, "cannot be read"),
    ):
        with pytest.raises(StorageError, match=words):
            open_copy(state, out if "exists" in words else tmp_path / "x", **arguments)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="Name a file elsewhere"):
        open_copy(state, state / "copy", run="r")
    open_copy(state, tmp_path / "split", file="split.json")
    assert b'"assignment"' in (tmp_path / "split").read_bytes()


def command(*arguments: object, code: int = 0) -> str:
    """What a command of `trunkline client` printed, and the text of its error, with all white space as one blank."""
    result = CliRunner().invoke(app, ["client", *map(str, arguments)], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert code, result.exception
        return str(result.exception)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_commands_seal_show_change_the_key_and_open(lived: Path, plants: list[Path], tmp_path: Path) -> None:
    site = Path(shutil.copytree(plants[0], tmp_path / "plant"))
    shutil.copytree(lived / "state", site / ".trunkline")
    assert "not sealed" in command("vault", "status", site)
    assert "is not sealed" in command("vault", "rekey", site, code=1)
    said = command("vault", "seal", site, "--key", key_of(tmp_path))
    first = find_seal(site / ".trunkline")
    assert first is not None
    assert f"3 files sealed with key {first.name}" in said
    assert "0 files" in command("vault", "seal", site)
    shown = command("vault", "status", site)
    assert f"sealed with key {first.name} from {key_of(tmp_path)}" in shown
    assert "plain" not in shown
    assert "r │ 1, 2" in shown
    assert "3 files sealed again" in command("vault", "rekey", site)
    shown = command("vault", "status", site)
    assert f"{first.name} │ yes, not needed here" in shown
    assert "Decrypted copy" in command("vault", "open", site, "--run", "r", "--round", 2, "--out", tmp_path / "copy")
    assert safetensors.numpy.load((tmp_path / "copy").read_bytes())
    assert "--run RUN" in command("vault", "open", site, "--out", tmp_path / "x", code=1)
    write_keys(key_of(tmp_path), (b"w" * 32,))
    assert "Nothing was changed" in command("vault", "status", site, code=1)
    assert "Nothing was changed" in command("vault", "open", site, "--run", "r", "--out", tmp_path / "x", code=1)
    assert "site.toml" in command("vault", "seal", tmp_path / "nowhere", code=1)
    assert not (tmp_path / "nowhere").exists()


def test_what_a_file_is_sealed_as_is_its_place() -> None:
    assert Kept(Path("/s/vault/r/x"), "vault/r/x", "", 0).about == "vault/r/x"
    assert Kept(Path("/s/identity/records.key"), "identity/records.key", "", 0).about == "records.key"
