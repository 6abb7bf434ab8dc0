"""A log whose every change is noticed: by its lines, by its order, and by its end."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trunkline.security.hash_chain
from trunkline.errors import StorageError, TamperError, TrustError
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import Seal
from trunkline.security.hash_chain import Chain
from trunkline.security.keys import new_signing_key

KEY = new_signing_key()
PUBLIC = KEY.public_key()
SEAL = Seal((b"a" * 32,), "test")


def chain_of(folder: Path, lines: int, seal: Seal | None = None) -> Chain:
    chain = Chain(folder / "manifest.jsonl", "manifest", seal)
    for number in range(1, lines + 1):
        chain.append(KEY, {"round": number, "array": "blocks.0.weight"})
    return chain


def bodies(chain: Chain) -> list[dict[str, object]]:
    return [link.body for link in chain.read(PUBLIC)]


@given(
    said=st.lists(st.dictionaries(st.text(max_size=8), st.integers() | st.text() | st.none(), max_size=4), max_size=6)
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("seal", [None, SEAL], ids=["plain", "sealed"])
def test_what_is_appended_is_read_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, said: list[dict[str, object]], seal: Seal | None
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    links = [Chain(folder / "log.jsonl", "log", seal).append(KEY, body) for body in said]
    found = list(Chain(folder / "log.jsonl", "log", seal).read(PUBLIC))
    assert found == links
    assert [link.body for link in found] == said
    assert [link.number for link in found] == list(range(1, len(said) + 1))


def test_no_changed_byte_of_a_line_goes_unnoticed(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 3)
    data = chain.path.read_bytes()
    start, end = data.index(b"\n") + 1, data.index(b"\n", data.index(b"\n") + 1)
    with chain.path.open("r+b", buffering=0) as file:
        for offset in range(start, end):
            for change in (1, 32):  # 32: the case of a letter, which hexadecimal digits do not care for
                os.pwrite(file.fileno(), bytes([data[offset] ^ change]), offset)
                with pytest.raises(TamperError, match=r"line [23]"):  # 3: the byte made a line end of itself
                    bodies(chain)
            os.pwrite(file.fileno(), data[offset : offset + 1], offset)
    assert len(bodies(chain)) == 3


def without(place: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: lines[:place] + lines[place + 1 :]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without(0), 1),
        (without(1), 2),
        (without(2), 3),
        (without(3), 4),
        (lambda lines: lines[:2], 2),
        (lambda lines: [], 0),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3], lines[4]], 2),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),
        (lambda lines: [*lines, lines[4]], 6),
        (lambda lines: [lines[0], b"", *lines[1:]], 2),
        (lambda lines: [lines[0].replace(b'"n": 1', b'"extra": 0, "n": 1'), *lines[1:]], 1),
        (lambda lines: [*lines[:4], lines[4][:-20]], 5),
    ],
    ids=["no 1", "no 2", "no 3", "no 4", "cut", "emptied", "swapped", "twice", "last twice", "blank", "key added", "short"],
)  # fmt: skip
def test_lines_removed_moved_or_added_are_noticed_with_the_number(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], line: int
) -> None:
    chain = chain_of(tmp_path, 5)
    lines = change(chain.path.read_bytes().splitlines())
    chain.path.write_bytes(b"".join(one + b"\n" for one in lines))
    with pytest.raises(TamperError, match=rf"line {line}\b"):
        bodies(chain)


def test_the_last_line_removed_is_noticed_by_reader_and_writer(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 3)
    before = b"".join(chain.path.read_bytes().splitlines(keepends=True)[:2])
    chain.path.write_bytes(before)
    with pytest.raises(TamperError, match="ends with line 2, and there were 3"):
        bodies(chain)
    with pytest.raises(TamperError, match="ends with line 2; its head says 3"):
        chain.append(KEY, {})
    assert chain.path.read_bytes() == before


def test_a_last_line_cut_in_two_is_told_from_one_torn_by_a_kill(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 3)
    before = chain.path.read_bytes()[:-20]
    chain.path.write_bytes(before)
    for use in (lambda: bodies(chain), lambda: chain.append(KEY, {})):
        with pytest.raises(TamperError, match="ends with line 2"):
            use()
    assert chain.path.read_bytes() == before  # what is left is evidence


@pytest.mark.parametrize("how", ["gone", "older", "other key", "edited", "forged number", "of another chain"])
def test_a_head_that_is_not_the_one_written_is_noticed(tmp_path: Path, how: str) -> None:
    chain = chain_of(tmp_path, 2)
    head = tmp_path / "manifest.jsonl.head"
    older = head.read_bytes()
    chain.append(KEY, {})
    chain.append(KEY, {})
    if how == "gone":
        head.unlink()
    elif how == "older":
        head.write_bytes(older)
    elif how == "other key":
        other = Chain(tmp_path / "x" / "manifest.jsonl", "manifest")
        for _ in range(4):
            other.append(new_signing_key(), {}) if not other.path.exists() else None
        head.write_bytes((tmp_path / "x" / "manifest.jsonl.head").read_bytes())
    elif how == "edited":
        head.write_bytes(head.read_bytes().replace(b'"n": 4', b'"n": 3'))
    elif how == "forged number":
        head.write_bytes(head.read_bytes().replace(b'"n": 4', b'"n": 4.0'))
    else:
        chain_of(tmp_path / "x", 4)
        head.write_bytes((tmp_path / "x" / "manifest.jsonl.head").read_bytes())
    for use in (lambda: bodies(chain), lambda: chain.append(KEY, {})):
        with pytest.raises(TamperError, match=r"head|line"):
            use()


def test_a_line_of_another_key_or_another_purpose_is_noticed_and_not_built_on(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 2)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    last = json.loads(chain.path.read_bytes().splitlines()[-1])
    for key, purpose in ((new_signing_key(), "manifest"), (KEY, "audit")):
        at, text = last["at"], '{"forged": 1}'
        found = trunkline.security.hash_chain._hash(3, at, last["hash"], text)
        by = trunkline.security.hash_chain.sign(key, purpose, bytes.fromhex(found))
        with chain.path.open("ab") as file:
            file.write(trunkline.security.hash_chain._line(3, at, last["hash"], text, found, by) + b"\n")
        for use in (lambda: bodies(chain), lambda: chain.append(KEY, {})):
            with pytest.raises(TamperError, match=r"line.*not written by the holder of the key"):
                use()
        for path, data in kept.items():
            path.write_bytes(data)


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_line_torn_by_a_kill_is_passed_over_and_heals(tmp_path: Path, lines: int) -> None:
    chain = chain_of(tmp_path, lines)
    whole = chain_of(tmp_path / "x", lines + 1).path.read_bytes().splitlines()[-1]
    with chain.path.open("ab") as file:
        file.write(whole[: len(whole) // 2])
    if lines:
        assert len(bodies(chain)) == lines
    chain.append(KEY, {"after": "the kill"})
    assert bodies(chain)[-1] == {"after": "the kill"}
    assert len(bodies(chain)) == lines + 1


@pytest.mark.parametrize("lines", [1, 2])
def test_a_kill_between_line_and_head_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    chain = chain_of(tmp_path, lines - 1)

    class Killed(BaseException):
        pass

    def write(path: Path, data: bytes, mode: int = 0o600) -> None:
        if json.loads(data)["n"] == lines:
            assert len(chain.path.read_bytes().splitlines()) == lines  # a head never runs ahead of its chain
            raise Killed
        write_atomic(path, data, mode)

    with monkeypatch.context() as patch:
        patch.setattr(trunkline.security.hash_chain, "write_atomic", write)
        with pytest.raises(Killed):
            chain.append(KEY, {"killed": True})
    assert len(bodies(chain)) == lines
    chain.append(KEY, {"after": True})
    assert bodies(chain)[-2:] == [{"killed": True}, {"after": True}]


def test_a_full_disk_leaves_the_chain_as_it_was_however_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(tmp_path, 2)
    before = chain.path.read_bytes()

    def full(path: Path, data: bytes, mode: int = 0o600) -> None:
        raise StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(trunkline.security.hash_chain, "write_atomic", full)
        for _ in range(3):
            with pytest.raises(StorageError, match="no space"):
                chain.append(KEY, {})
    assert chain.path.read_bytes() == before
    chain.append(KEY, {})
    assert len(bodies(chain)) == 3


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from trunkline.security.hash_chain import Chain
from trunkline.errors import StorageError
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the kernel refuses the write half-way, as a full disk does
chain, key = Chain(Path(sys.argv[1]), "manifest"), Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sys.argv[2]))
for attempt in range(2):
    try:
        chain.append(key, {"long": "x" * 30_000})
    except StorageError as error:
        print(error)
chain.append(key, {"short": True})
"""


def test_a_disk_that_fills_up_within_a_line_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 2)
    command = [sys.executable, "-c", FULL_DISK, str(chain.path), KEY.private_bytes_raw().hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not be written") == 2
    assert "Free space" in done.stdout
    assert [*bodies(chain)[-1]] == ["short"]
    assert len(bodies(chain)) == 3


def _append(path: Path, key: bytes, who: int, count: int) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    for number in range(count):
        Chain(path, "log").append(Ed25519PrivateKey.from_private_bytes(key), {"who": who, "number": number})


def test_two_processes_that_append_at_once_make_one_intact_chain_and_a_reader_is_never_misled(tmp_path: Path) -> None:
    path, count = tmp_path / "log.jsonl", 40
    start = multiprocessing.get_context("fork").Process
    writers = [start(target=_append, args=(path, KEY.private_bytes_raw(), who, count)) for who in (0, 1)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        list(Chain(path, "log").read(PUBLIC))
    for writer in writers:
        writer.join(timeout=30)
        assert writer.exitcode == 0
    found = bodies(Chain(path, "log"))
    for who in (0, 1):
        assert [body["number"] for body in found if body["who"] == who] == list(range(count))


def test_a_sealed_chain_says_nothing_in_the_clear_and_opens_by_its_key_only(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 3, SEAL)
    assert b"blocks" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(bodies(chain)) == 3
    for seal, words in ((Seal((b"b" * 32,), "test"), "sealed with key"), (None, r"seal\.toml")):
        with pytest.raises(TrustError, match=words) as caught:
            bodies(Chain(chain.path, "manifest", seal))
        assert not isinstance(caught.value, TamperError)


def test_lines_from_before_the_seal_stay_readable_and_verified(tmp_path: Path) -> None:
    chain_of(tmp_path, 2)
    chain = chain_of(tmp_path, 2, SEAL)
    assert [body["round"] for body in bodies(chain)] == [1, 2, 1, 2]
    chain.path.write_bytes(chain.path.read_bytes().replace(b"blocks", b"blacks", 1))
    with pytest.raises(TamperError, match="line 1: was altered"):
        bodies(chain)


def test_a_new_key_reads_what_the_older_one_sealed(tmp_path: Path) -> None:
    chain_of(tmp_path, 2, SEAL)
    chain = chain_of(tmp_path, 1, Seal((b"b" * 32, *SEAL.keys), "test"))
    assert [body["round"] for body in bodies(chain)] == [1, 2, 1]
