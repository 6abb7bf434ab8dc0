"""State that is another's, newer, damaged, or on a disk that takes nothing, and a clock that was never set: each is named,
and nothing is overwritten.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest
from flwr.app import Message

import trunkline
from tests.loopback import WatchedGrid, events_of, federate, trunk_of
from trunkline.client.agent import daemon as plant_daemon
from trunkline.client.agent import join as joining
from trunkline.client.site import open_site
from trunkline.errors import DeploymentError, ForeignState, QuorumError, StorageError, TrustError
from trunkline.flower.records import open_records
from trunkline.security import keys
from trunkline.security.enrolment import Code
from trunkline.server.membership import authority
from trunkline.server.operations import daemon as centre_daemon
from trunkline.server.operations.run_store import RunLock
from trunkline.server.releases import signing
from trunkline.server.rounds.disk_wait import DiskWait

pytestmark = pytest.mark.xdist_group("bad input")  # one worker: the run that all of these begin from is made once
SMALL = {"trunk": {"width": 4}, "training": {"steps": 1, "batch_size": 16}, "strategy": {"name": "fedrep"}}
NEWEST = "round-000002.safetensors"


class PowerCut(BaseException):
    """Not an Exception, so that nothing in the code under test can catch it."""


def cut(message: Message, honest: Callable[[], Message]) -> Message:
    if message.metadata.message_type == "train" and json.loads(open_records(message.content)[1])["round"] == 3:
        raise PowerCut
    return honest()


@pytest.fixture(scope="module")
def began(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of that name, which the power cut off in its last round."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            with pytest.raises(PowerCut):
                federate(plants[:2], made[name], tamper={2: cut}, name=name, **SMALL)
        return made[name]

    return run


@pytest.fixture
def out(began: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(began("quick"), tmp_path / "out")


@pytest.fixture(scope="module")
def whole(plants: list[Path], began: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the trunk that the run ends with when its power comes back."""
    out = shutil.copytree(began("quick"), tmp_path_factory.mktemp("whole") / "out")
    go_on(plants, out)
    return trunk_of(out).digest()


def bytes_of(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def go_on(plants: list[Path], out: Path, **settings: object) -> WatchedGrid:
    return federate(plants[:2], out, resume=True, grid=WatchedGrid(plants[:2], out), **{**SMALL, **settings})


def said(out: Path) -> str:
    return " ".join(event.get("text", "") for event in events_of(out))


def newer(data: bytes) -> bytes:
    """The same file as a later Trunkline might write it."""
    size = int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8 : 8 + size]), "format": 7, "by": "9.1.0", "news": True}
    line = json.dumps(header).encode()
    data = len(line).to_bytes(8, "little") + line + data[8 + size : -32]
    return data + sha256(data).digest()


def test_the_checkpoint_of_another_run_is_not_gone_on_from(
    plants: list[Path], out: Path, began: Callable[[str], Path]
) -> None:
    shutil.copy(began("other") / "checkpoint" / NEWEST, out / "checkpoint" / NEWEST)
    before = bytes_of(out / "checkpoint", out / "state")
    with pytest.raises(ForeignState, match=r"holds checkpoints of 2 runs \('other-.*', 'quick-.*'\)"):
        go_on(plants, out)
    assert "Move those of the others away" in said(out)
    assert bytes_of(out / "checkpoint", out / "state") == before


def test_a_run_that_begins_in_the_folder_of_another_leaves_its_checkpoints_alone(plants: list[Path], out: Path) -> None:
    before = bytes_of(out / "checkpoint", out / "state")
    with pytest.raises(ForeignState, match=r"is of run 'quick-.*', and this is run 'second-.*--resume.*another --out"):
        federate(plants[:2], out, name="second", **SMALL)
    assert bytes_of(out / "checkpoint", out / "state") == before


def test_a_checkpoint_of_a_newer_trunkline_is_not_passed_over(plants: list[Path], out: Path) -> None:
    path = out / "checkpoint" / NEWEST
    path.write_bytes(newer(path.read_bytes()))
    before = bytes_of(out / "checkpoint", out / "state")
    match = (
        rf"format 7, written by Trunkline 9\.1\.0; this is Trunkline {trunkline.__version__} and reads up to 2\. Update"
    )
    with pytest.raises(ForeignState, match=match):
        go_on(plants, out)
    assert bytes_of(out / "checkpoint", out / "state") == before


@pytest.mark.parametrize("damage", ["half", "header", "body"])
def test_a_damaged_checkpoint_is_named_kept_and_the_run_ends_with_the_same_bytes(
    plants: list[Path], out: Path, whole: str, damage: str
) -> None:
    path = out / "checkpoint" / NEWEST
    data = bytearray(path.read_bytes())
    place = data.index(b'"seconds": ') + 11 if damage == "header" else len(data) // 2  # a number stays a number
    data[place] ^= 1
    path.write_bytes(data if damage != "half" else data[: len(data) // 2])
    broken = path.read_bytes()
    go_on(plants, out)
    assert f"{path}: damaged" in said(out)
    assert "Going back to round 1" in said(out)
    assert path.with_suffix(".damaged").read_bytes() == broken
    assert trunk_of(out).digest() == whole


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_site_with_the_state_of_another_refuses_to_train(plants: list[Path], out: Path) -> None:
    states = [out / "state" / plant.name for plant in plants[:2]]
    swap(*states)
    before = bytes_of(out / "state")
    grid = WatchedGrid(plants[:2], out)  # once as at a start, and once more by sites that are open already
    for _ in range(2):
        with pytest.raises(QuorumError) as refused:
            federate(plants[:2], out, resume=True, grid=grid, **SMALL)
        assert f"is of site '{plants[1].name}', and this is site '{plants[0].name}'" in str(refused.value)
        assert bytes_of(out / "state") == before
    with pytest.raises(ForeignState, match=r"state folder, or theirs were swapped; nothing was trained.*--state"):
        plant_daemon.start(plants[0], state=states[0])
    assert bytes_of(out / "state") == before


def test_a_site_that_is_open_while_states_are_swapped_trains_nothing(plants: list[Path], out: Path) -> None:
    grid = WatchedGrid(plants[:2], out)
    for context in grid.contexts.values():
        open_site(context.node_config)
    swap(*(out / "state" / plant.name for plant in plants[:2]))
    before = bytes_of(out / "state")
    with pytest.raises(QuorumError, match=f"is of site '{plants[1].name}'"):
        federate(plants[:2], out, resume=True, grid=grid, **SMALL)
    assert bytes_of(out / "state") == before


def test_a_vault_of_a_newer_trunkline_is_not_trained_over(plants: list[Path], out: Path) -> None:
    for path in (out / "state").rglob(NEWEST):
        path.write_bytes(newer(path.read_bytes()))
    before = bytes_of(out / "state")
    with pytest.raises(QuorumError, match=r"format 7, written by Trunkline 9\.1\.0"):
        go_on(plants, out)
    assert bytes_of(out / "state") == before


def test_what_is_anothers_is_not_waited_for_as_a_full_disk_is(tmp_path: Path) -> None:
    def put() -> None:
        raise ForeignState("of another run")

    with pytest.raises(ForeignState):
        DiskWait(tmp_path, pytest.fail, seconds=60.0)(put)


# -- the clock

WRONG = "clock is wrong. Set it"


@pytest.fixture
def in_1970(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (keys, authority, signing, joining):
        monkeypatch.setattr(module, "now", lambda: datetime(1970, 1, 1, 0, 3, tzinfo=UTC))


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        state = tmp_path_factory.mktemp("centre") / "s"
        authority.init(state, "North", ("127.0.0.1",), f"file:{tmp_path_factory.mktemp('key') / 'k'}")
    return state


def test_with_a_clock_in_1970_nothing_begins_and_the_clock_is_named(
    plants: list[Path], centre: Path, tmp_path: Path, in_1970: None
) -> None:
    before = bytes_of(centre)
    code = Code.new(keys.read_certificate(centre / "authority.crt"))
    for begin in (
        lambda: authority.init(tmp_path / "new", "South", ()),
        lambda: authority.Authority.open(centre),
        lambda: centre_daemon.start(centre),
        lambda: centre_daemon.start(tmp_path / "plain"),
        lambda: plant_daemon.start(plants[0], state=tmp_path / "plant"),
        lambda: joining.join(plants[0], tmp_path / "plant", "127.0.0.1:9", code),
        lambda: joining.write_request(plants[0], tmp_path / "plant", code, tmp_path / "request"),
        lambda: joining.accept_admission(plants[0], tmp_path / "plant", code, tmp_path / "answer"),
    ):
        with pytest.raises(TrustError, match=WRONG) as wrong:
            begin()
        assert "1970-01-01 00:03 UTC" in str(wrong.value)
        assert "certificate has expired" not in str(wrong.value)
    assert bytes_of(centre) == before
    assert not list(tmp_path.iterdir())


def test_with_a_clock_in_1970_no_run_begins_whose_release_nobody_would_believe(
    plants: list[Path], centre: Path, tmp_path: Path, in_1970: None
) -> None:
    with pytest.raises(
        TrustError, match=r"valid from .* on, and the clock here says 1970-01-01 00:03 UTC: set the clock"
    ):
        federate(plants[:1], tmp_path / "out", centre=centre, **SMALL)
    assert not (tmp_path / "out" / "checkpoint").exists()


COMMAND = """
import sys
from datetime import UTC, datetime
import trunkline.security.keys
trunkline.security.keys.now = lambda: datetime(1970, 1, 1, tzinfo=UTC)
from trunkline.cli.app import main
main()
"""


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    arguments = ["server", "init", "--state", str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert WRONG in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_membership_that_is_younger_than_the_clock_is_no_reason_to_ask_for_an_invitation(
    centre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = joining.Identity.of(tmp_path)
    identity.folder.mkdir()
    for name, place in (("server.crt", identity.certificate), ("authority.crt", identity.authority)):
        shutil.copy(centre / name, place)
    (identity.folder / joining.MEMBERSHIP).write_text('{"federation": "North", "site": "p", "server": "127.0.0.1:9"}')
    monkeypatch.setattr(keys, "now", lambda: datetime(2026, 2, 1, tzinfo=UTC))  # a clock that was set once, long ago
    with pytest.raises(TrustError, match=WRONG):
        joining.hello(tmp_path)


# -- disks that take nothing


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes small file systems of their own: `disk(folder)` mounts one there, with what the folder held."""
    mounted: list[Path] = []

    def make(folder: Path) -> Path:
        held = tmp_path / f"held-{len(mounted)}"
        folder.rename(held) if folder.exists() else held.mkdir()
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(folder)],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"this account may not mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)
        shutil.copytree(held, folder, dirs_exist_ok=True)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], timeout=20, check=True)


def closed(folder: Path, how: str) -> Path:
    """From now on `folder`, a file system of its own, takes nothing more."""
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], timeout=20, check=True)
        return folder
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return folder


@pytest.mark.parametrize(("how", "why"), [("read-only", "Read-only file system"), ("full", "No space left")])
def test_a_disk_that_takes_nothing_is_named_by_the_centre_and_by_the_site(
    plants: list[Path], out: Path, disk: Callable[..., Path], how: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = closed(disk(out / "state"), how)
    before = bytes_of(state)
    with pytest.raises(QuorumError, match=f"round 3: no update. its disk is {how}; ask again"):
        go_on(plants, out)
    assert re.search(rf"could not be written \({why}.*version before it is intact.*start again", caplog.text)
    assert bytes_of(state) == before
    kept = closed(disk(out / "checkpoint"), how)
    before = bytes_of(kept)
    grid = WatchedGrid(plants[:2], out.with_name("elsewhere"))  # sites with room
    shutil.copytree(state, out.with_name("elsewhere") / "state")
    with pytest.raises(StorageError, match=rf"round-000003.*could not be written \({why}.*version before it is intact"):
        federate(plants[:2], out, resume=True, grid=grid, **SMALL)
    assert bytes_of(kept) == before


@pytest.mark.parametrize("what", ["centre", "plant", "run"])
def test_on_a_read_only_disk_nothing_begins(
    plants: list[Path], tmp_path: Path, disk: Callable[..., Path], what: str
) -> None:
    folder = closed(disk(tmp_path / "state"), "read-only")
    before = bytes_of(folder)
    with pytest.raises((StorageError, DeploymentError), match="Read-only file system") as refused:
        if what == "centre":
            centre_daemon.start(folder, port=19140)
        elif what == "plant":
            plant_daemon.start(plants[0], state=folder)
        else:
            RunLock(folder, 1)
    assert str(folder) in str(refused.value)
    assert bytes_of(folder) == before
