"""Encryption at rest: what opens, what does not, and how each refusal is told apart."""

import base64
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.errors import StorageError, TrustError
from trunkline.runtime.storage import MAGIC, Shelf, read_private, write_private
from trunkline.security.encryption import (
    OVERHEAD,
    SETTINGS,
    Seal,
    find_seal,
    find_seal_of,
    is_sealed,
    key_name,
    make_seal,
    read_keys,
    sealing_key_name,
    stored_keys,
    write_keys,
    write_settings,
)

A, B = b"a" * 32, b"b" * 32
SEAL = Seal((A,), "test")


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], str]:
    """The interface of the package keyring over a dictionary."""
    kept: dict[tuple[str, str], str] = {}
    fake = types.ModuleType("keyring")
    fake.set_password = lambda service, name, text: kept.__setitem__((service, name), text)  # type: ignore[attr-defined]
    fake.get_password = lambda service, name: kept.get((service, name))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", fake)
    return kept


# --- one sealed thing --------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=5000), about=st.text(max_size=40))
def test_what_is_closed_opens_to_the_same_bytes_and_costs_53_more(data: bytes, about: str) -> None:
    closed = SEAL.close(data, about)
    assert is_sealed(closed)
    assert sealing_key_name(closed) == SEAL.name == key_name(A)
    assert len(closed) == len(data) + OVERHEAD
    assert SEAL.open(closed, about, "x") == data


@given(data=st.binary(min_size=16, max_size=500))
def test_it_says_nothing_of_what_it_holds_and_never_the_same_twice(data: bytes) -> None:
    closed = SEAL.close(data, "x")
    assert data not in closed[len(MAGIC) :]
    assert closed != SEAL.close(data, "x")


def test_any_flipped_bit_anywhere_is_noticed_as_damage() -> None:
    closed = SEAL.close(b"the stem of press-07", "vault/r/round-000001.safetensors")
    for at in range(8 * len(closed)):
        flipped = bytearray(closed)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(StorageError, match="altered"):
            SEAL.open(bytes(flipped), "vault/r/round-000001.safetensors", "here")


@given(data=st.binary(max_size=60), cut=st.integers(0, 200))
def test_a_shorter_or_longer_one_is_noticed(data: bytes, cut: int) -> None:
    closed = SEAL.close(data, "x")
    for wrong in (closed[: cut % len(closed)], closed + b"\0"):
        with pytest.raises((StorageError, TrustError)):
            SEAL.open(wrong, "x", "here")


@given(one=st.text(max_size=20), other=st.text(max_size=20))
def test_it_opens_only_as_what_it_was_sealed(one: str, other: str) -> None:
    closed = SEAL.close(b"data", one)
    if one == other:
        assert SEAL.open(closed, other, "here") == b"data"
    else:
        with pytest.raises(StorageError, match=r"here: .*moved"):
            SEAL.open(closed, other, "here")


def test_another_key_is_named_and_is_no_damage() -> None:
    with pytest.raises(TrustError) as caught:
        Seal((B,), "env:K").open(SEAL.close(b"data", "x"), "x", "here")
    for word in ("here", key_name(A), key_name(B), "env:K", "Nothing was changed"):
        assert word in str(caught.value)
    assert not isinstance(caught.value, StorageError)


def test_plain_data_is_refused_with_what_to_do() -> None:
    with pytest.raises(TrustError, match="trunkline client vault seal SITE_DIR"):
        SEAL.open(b"plain", "x", "here")


def test_a_newer_key_seals_and_the_older_still_opens() -> None:
    both = Seal((B, A), "test")
    old, new = SEAL.close(b"old", "x"), both.close(b"new", "x")
    assert (both.open(old, "x", ""), both.open(new, "x", "")) == (b"old", b"new")
    assert (both.newest(old), both.newest(new)) == (False, True)


# --- where keys come from ------------------------------------------------------------------------------------------


def test_a_folder_without_a_seal_has_none(tmp_path: Path) -> None:
    assert find_seal(tmp_path) is None
    assert find_seal(tmp_path / "absent") is None
    assert find_seal_of(tmp_path / "a" / "b") == (None, "")


def test_the_default_key_lies_outside_the_state_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    state = tmp_path / "state"
    seal = make_seal(state)
    assert find_seal(state) == seal == make_seal(state)
    (key,) = (tmp_path / "config" / "trunkline" / "keys").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    written = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert base64.b64encode(seal.keys[0]) not in written
    assert seal.keys[0] not in written


@pytest.mark.parametrize("name", ["plain", 'it\'s "quoted" \\ ü'])
def test_a_key_file_of_any_name_is_found_again(tmp_path: Path, name: str) -> None:
    seal = make_seal(tmp_path / "state", f"file:{tmp_path / name}")
    assert find_seal(tmp_path / "state") == seal
    assert read_keys(seal.source) == seal.keys


def test_a_source_named_from_here_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seal = make_seal(tmp_path / "state", "file:key")
    monkeypatch.chdir("/")
    assert find_seal(tmp_path / "state") == seal


def test_a_key_beside_what_it_seals_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="Keep it elsewhere"):
        make_seal(tmp_path / "state", f"file:{tmp_path / 'state' / 'key'}")
    assert not (tmp_path / "state").exists()


def test_the_environment_may_hold_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrustError, match="the environment has no TRUNKLINE_KEY"):
        make_seal(tmp_path, "env:TRUNKLINE_KEY")
    monkeypatch.setenv("TRUNKLINE_KEY", base64.b64encode(A).decode())
    seal = make_seal(tmp_path, "env:TRUNKLINE_KEY")
    assert find_seal(tmp_path) == seal == Seal((A,), "env:TRUNKLINE_KEY")
    monkeypatch.setenv("TRUNKLINE_KEY", base64.b64encode(B).decode())
    with pytest.raises(TrustError, match=f"holds key {key_name(B)}.*sealed with key {key_name(A)}"):
        find_seal(tmp_path)
    with pytest.raises(TrustError, match="Set it to"):
        write_keys("env:TRUNKLINE_KEY", (A,))


def test_the_systems_keyring_may_hold_the_key(tmp_path: Path, ring: dict[tuple[str, str], str]) -> None:
    seal = make_seal(tmp_path, "keyring:press-07")
    assert list(ring) == [("trunkline", "press-07")]
    assert find_seal(tmp_path) == seal
    write_keys(seal.source, (B, *seal.keys))
    again = find_seal(tmp_path)
    assert again is not None
    assert again.keys == (B, *seal.keys)
    ring.clear()
    assert stored_keys(seal.source) == ()
    with pytest.raises(TrustError, match="no such entry"):
        find_seal(tmp_path)


def test_a_locked_keyring_is_told_in_words(tmp_path: Path, ring: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*args: str) -> None:
        raise RuntimeError("locked")

    monkeypatch.setattr(sys.modules["keyring"], "get_password", locked)
    with pytest.raises(TrustError, match=r"keyring:x: .*locked.*Unlock"):
        make_seal(tmp_path, "keyring:x")


@pytest.mark.parametrize(
    "text", ["", "short", base64.b64encode(b"a" * 31).decode(), "not base64 at all!", "\n\n"], ids=repr
)
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(TrustError, match="expected 32 bytes in base64"):
        read_keys(f"file:{path}")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_key_file_that_others_may_use_is_refused_with_chmod(tmp_path: Path, mode: int) -> None:
    make_seal(tmp_path / "state", f"file:{tmp_path / 'key'}")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(TrustError, match=f"chmod 600 {tmp_path / 'key'}"):
        find_seal(tmp_path / "state")


def test_a_key_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    make_seal(tmp_path / "state", f"file:{tmp_path / 'key'}")
    before = (tmp_path / "state" / SETTINGS).read_bytes()
    (tmp_path / "key").unlink()
    for use in (find_seal, make_seal):
        with pytest.raises(TrustError, match="the key file is gone"):
            use(tmp_path / "state")
    assert not (tmp_path / "key").exists()
    assert (tmp_path / "state" / SETTINGS).read_bytes() == before


def test_another_source_is_not_taken_silently(tmp_path: Path) -> None:
    make_seal(tmp_path / "state", f"file:{tmp_path / 'key'}")
    with pytest.raises(TrustError, match="rekey"):
        make_seal(tmp_path / "state", f"file:{tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["", "source = 1", "source = 'file:x'\n", "[[["])
def test_a_damaged_seal_toml_is_not_taken_for_no_seal(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(TrustError, match=SETTINGS):
        find_seal(tmp_path)


def test_an_older_key_may_be_remembered_while_a_newer_one_already_seals(tmp_path: Path) -> None:
    source = f"file:{tmp_path / 'key'}"
    write_keys(source, (B, A))
    write_settings(tmp_path / "state", Seal((B, A), source), key_name(A))
    seal = find_seal(tmp_path / "state")
    assert seal is not None
    assert seal.name == key_name(B)


# --- files and shelves ---------------------------------------------------------------------------------------------


def test_a_sealed_file_and_its_folders_are_for_this_account_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_private(tmp_path / "a" / "b" / "c", b"x", SEAL, "a/b/c", mode=0o644)
    finally:
        os.umask(old)
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b")} == {0o700}


def test_without_a_seal_a_file_is_what_it_was_given(tmp_path: Path) -> None:
    write_private(tmp_path / "a", b"x", None, "a", mode=0o644)
    assert (tmp_path / "a").read_bytes() == b"x"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def shelf(folder: Path, *keys: bytes, told: list[str] | None = None) -> Shelf:
    told = [] if told is None else told
    return Shelf(folder, tell=told.append, seal=Seal(keys, "test") if keys else None, place="vault/r")


def filled(folder: Path, *keys: bytes) -> Shelf:
    made = shelf(folder, *keys)
    for round in (1, 2, 3):
        made.put(round, {"w": np.full(3, round, np.float32)}, {"round": round})
    return made


def test_a_sealed_shelf_gives_back_what_it_was_given_and_shows_none_of_it(tmp_path: Path) -> None:
    made = filled(tmp_path, A)
    tensors, meta = made.get(2)
    np.testing.assert_array_equal(tensors["w"], np.full(3, 2, np.float32))
    assert meta == {"round": 2}
    for path in tmp_path.iterdir():
        assert is_sealed(path.read_bytes())
        assert b"sha256" not in path.read_bytes()


def test_a_wrong_key_is_never_passed_over_to_an_older_version(tmp_path: Path) -> None:
    filled(tmp_path, A)
    shelf(tmp_path, B, A).put(4, {"w": np.zeros(1)}, {})
    told: list[str] = []
    with pytest.raises(TrustError, match=key_name(B)):
        shelf(tmp_path, A, told=told).newest()
    assert told == []


def test_a_sealed_shelf_without_its_seal_is_refused_and_not_damaged(tmp_path: Path) -> None:
    filled(tmp_path, A)
    with pytest.raises(TrustError, match=r"Restore a backup of seal\.toml"):
        shelf(tmp_path).newest()


def test_a_plain_version_where_all_should_be_sealed_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(TrustError, match="vault seal"):
        shelf(tmp_path, A).newest()


@pytest.mark.parametrize("damage", ["flip", "first", "name", "cut", "short", "empty", "garbage"])
def test_a_damaged_sealed_version_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    data = filled(tmp_path, A).path(3).read_bytes()
    flipped = {"flip": len(data) - 1, "first": 0, "name": 20}
    if damage in flipped:
        at = flipped[damage]
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    else:
        data = {"cut": data[: len(data) // 2], "short": data[:10], "empty": b"", "garbage": b"\xff" * 40}[damage]
    told: list[str] = []
    made = shelf(tmp_path, A, told=told)
    made.path(3).write_bytes(data)
    found = made.newest()
    assert found is not None
    assert found[0] == 2
    assert "Going back to round 2" in told[0]


def test_a_version_put_under_another_round_run_or_name_does_not_open(tmp_path: Path) -> None:
    made = filled(tmp_path, A)
    made.path(3).write_bytes(made.path(1).read_bytes())  # rolled back
    with pytest.raises(StorageError, match="moved"):
        made.get(3)
    with pytest.raises(StorageError, match="moved"):
        Shelf(tmp_path, seal=SEAL, place="vault/other").get(2)
    write_private(tmp_path / "x", b"x", SEAL, "x")
    (tmp_path / "x").rename(tmp_path / "y")
    with pytest.raises(StorageError, match="moved"):
        read_private(tmp_path / "y", SEAL, "y")


def test_a_process_that_seals_nothing_gets_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trunkline.security.encryption import environment_without_key, make_seal

    monkeypatch.setenv("PLANT_KEY", base64.b64encode(bytes(range(32))).decode())
    assert environment_without_key({"PLANT_KEY": "k", "A": "b"}, tmp_path) == {"PLANT_KEY": "k", "A": "b"}, (
        "nothing is sealed here"
    )
    make_seal(tmp_path, "env:PLANT_KEY")
    assert environment_without_key({"PLANT_KEY": "k", "A": "b"}, tmp_path) == {"A": "b"}
