"""Keys and certificates: what is damaged, of another kind, or readable by others is refused by name; clocks are checked."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from tests.server.federation import issue
from trunkline.errors import TrustError
from trunkline.security import keys


@pytest.mark.parametrize("damage", [b"", b"no PEM", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_damaged_pem_is_refused_by_the_place_it_came_from(damage: bytes, tmp_path: Path) -> None:
    for load in (keys.load_key, keys.load_public, keys.load_certificate):
        with pytest.raises(TrustError, match=r"site\.pem: not a .* in PEM"):
            load(damage, "site.pem")
    path = tmp_path / "site.crt"
    path.write_bytes(damage)
    with pytest.raises(TrustError, match="not a certificate in PEM"):
        keys.read_certificate(path)


def test_keys_and_certificates_are_read_as_they_were_written(tmp_path: Path) -> None:
    key = keys.new_site_key()
    keys.write_site_key(tmp_path / "site.key", key)
    assert (tmp_path / "site.key").stat().st_mode & 0o777 == 0o600
    assert keys.load_key(keys.key_pem(key), "x").private_numbers() == key.private_numbers()
    assert keys.key_id(keys.load_public(keys.spki(key.public_key()), "x")) == keys.key_id(key.public_key())
    certificate = issue(key, "press-07")
    (tmp_path / "site.crt").write_bytes(keys.certificate_pem(certificate))
    assert keys.read_certificate(tmp_path / "site.crt") == certificate
    assert keys.common_name(certificate) == "press-07"
    digits = keys.group_digits(keys.fingerprint(certificate))
    assert digits.replace(" ", "").lower() == keys.fingerprint(certificate) and len(digits.split()) == 16


def test_an_absent_or_unreadable_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"no such file\. Has this site joined\?"):
        keys.read_certificate(tmp_path / "site.crt")
    with pytest.raises(TrustError, match="cannot be read"):
        keys.read_certificate(tmp_path)


def test_a_private_file_that_others_can_read_or_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    with pytest.raises(TrustError, match="No such file"):
        keys.check_private(path)
    path.write_bytes(b"x")
    path.chmod(0o640)
    with pytest.raises(TrustError, match=r"other accounts may read it \(mode 640\)"):
        keys.check_private(path)
    path.chmod(0o600)
    keys.check_private(path)
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(TrustError, match=r"belongs to another account \(uid 12345\)"):
            keys.check_private(path)


def test_only_the_key_of_the_authority_issues() -> None:
    authority_key, other_key, site_key = keys.new_site_key(), keys.new_site_key(), keys.new_site_key()
    authority = issue(authority_key, "authority", usage=None)
    assert keys.is_issued_by(issue(site_key, "press-07", (authority_key, "authority")), authority)
    assert not keys.is_issued_by(issue(site_key, "press-07", (other_key, "authority")), authority)  # only the same name
    assert not keys.is_issued_by(issue(site_key, "press-07", (authority_key, "another")), authority)


def test_a_signature_holds_for_its_data_purpose_and_key_only() -> None:
    key, other = keys.new_signing_key(), keys.new_signing_key()
    signature = keys.sign(key, "manifest", b"data")
    assert keys.is_signed(key.public_key(), "manifest", b"data", signature)
    for public, purpose, data, text in (
        (other.public_key(), "manifest", b"data", signature),
        (key.public_key(), "audit", b"data", signature),
        (key.public_key(), "manifest", b"Data", signature),
        (key.public_key(), "manifest", b"data", "no hexadecimal digits"),
    ):
        assert not keys.is_signed(public, purpose, data, text)


NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """The time that `keys.now` gives; a test moves it."""
    times = [NOW]
    monkeypatch.setattr(keys, "now", lambda: times[0])
    return times


def test_a_certificate_warns_before_during_and_after_its_last_third(clock: list[datetime]) -> None:
    certificate = issue(keys.new_site_key(), "x", since=NOW, until=NOW + timedelta(days=90))
    cases = (
        (-1 / 24, "is valid from 2026-06-01 12:00 UTC on", False),
        (59, "", False),
        (61, "expires in 29 days", True),
        (89, "expires in 24.0 hours", True),
        (91, "has expired on 2026-08-30", True),
    )
    for days, words, needs_renewal in cases:
        clock[0] = NOW + timedelta(days=days)
        warning = keys.expiry_warning(certificate, "the certificate", "Renew it.")
        assert words in warning if words else not warning, (days, warning)
        assert keys.needs_renewal(certificate) == needs_renewal
        assert keys.time_left(certificate) == timedelta(days=90 - days)


def test_a_clock_before_trunkline_or_before_a_certificate_here_is_refused(clock: list[datetime]) -> None:
    certificate = issue(keys.new_site_key(), "x", since=NOW, until=NOW + timedelta(days=90))
    keys.check_clock(certificate)
    clock[0] = NOW - timedelta(days=1)
    keys.check_clock()
    with pytest.raises(TrustError, match="what lies here was made on 2026-06-01"):
        keys.check_clock(certificate)
    clock[0] = datetime(1970, 1, 1, tzinfo=UTC)
    with pytest.raises(TrustError, match="Trunkline was made on 2026-01-01"):
        keys.check_clock()


@pytest.mark.parametrize(("seconds", "words"), [(0, ""), (2, ""), (4, "4 s behind"), (-60, "60 s ahead of")])
def test_two_clocks_that_differ_are_reported(seconds: float, words: str, clock: list[datetime]) -> None:
    warning = keys.skew_warning(NOW + timedelta(seconds=seconds))
    assert (words in warning) if words else warning == ""


def test_a_key_on_a_smaller_curve_has_another_id() -> None:
    small, large = generate_private_key(SECP256R1()), keys.new_site_key()
    assert len({keys.key_id(small.public_key()), keys.key_id(large.public_key())}) == 2
