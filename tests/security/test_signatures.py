"""A signature over a release: what is altered, of another federation or of nobody is told apart."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.server.federation import issue
from trunkline.errors import TamperError, TrustError
from trunkline.protocol.arrays import Arrays
from trunkline.security import keys
from trunkline.security.signatures import (
    RELEASES,
    Signature,
    check_certificate,
    digest_arrays,
    sign_release,
    unsigned_verdict,
    verify_signature,
)

AUTHORITY_KEY, SIGNING_KEY = keys.new_site_key(), keys.new_signing_key()
AUTHORITY = issue(AUTHORITY_KEY, "north", usage=None)
CARD, ARRAYS = "1" * 64, "2" * 64


def certificate(key: Any = SIGNING_KEY, name: str = RELEASES, issuer: Any = None, **options: Any) -> x509.Certificate:
    options = {"usage": ExtendedKeyUsageOID.CODE_SIGNING, **options}
    return issue(key, name, issuer or (AUTHORITY_KEY, "north"), **options)


def signature(**options: Any) -> Signature:
    return sign_release(SIGNING_KEY, certificate(**options), CARD, ARRAYS, keys.now())


def test_a_signed_release_is_verified_and_says_by_whom() -> None:
    verdict = verify_signature("trunk", signature(), CARD, ARRAYS, AUTHORITY)
    assert verdict.right and verdict.federation == "north" and verdict.line.startswith("Verified: trunk: ")
    verdict.demand(AUTHORITY, unsigned=False)


@pytest.mark.parametrize(
    ("card", "arrays", "words"),
    [
        ("3" * 64, ARRAYS, "its card was altered"),
        (CARD, "3" * 64, "its arrays were altered"),
        ("3" * 64, "3" * 64, "its signature is of another file"),
    ],
)
def test_what_was_altered_is_named_and_never_used(card: str, arrays: str, words: str) -> None:
    verdict = verify_signature("trunk", signature(), card, arrays, AUTHORITY)
    assert not verdict.right and words in verdict.line and verdict.line.startswith("Not verified")
    with pytest.raises(TamperError, match=words):
        verdict.demand(AUTHORITY, unsigned=True)


@pytest.mark.parametrize(
    "change",
    [
        {"value": "0" * 128},
        {"certificate": "no PEM"},
        {"signed_at": "yesterday"},
        {"signed_at": "2026-06-01T12:00:00"},
    ],
)
def test_a_damaged_signature_is_refused(change: dict[str, str]) -> None:
    verdict = verify_signature("trunk", signature().model_copy(update=change), CARD, ARRAYS, AUTHORITY)
    assert isinstance(verdict.problem, TamperError)


def test_without_an_authority_a_signature_is_a_claim_only() -> None:
    verdict = verify_signature("trunk", signature(), CARD, ARRAYS, None)
    assert not verdict.right and "by its own words for 'north'" in verdict.text
    verdict.demand(None, unsigned=False)


def test_what_nobody_signed_is_used_only_where_it_is_asked_for() -> None:
    verdict = unsigned_verdict("trunk")
    verdict.demand(AUTHORITY, unsigned=True)
    verdict.demand(None, unsigned=False)
    with pytest.raises(TrustError, match="--unsigned"):
        verdict.demand(AUTHORITY, unsigned=False)


def test_only_a_valid_certificate_for_releases_of_the_same_authority_counts() -> None:
    stranger = keys.new_site_key()
    refused = (
        (certificate(issuer=(stranger, "south")), "signed by another federation: its certificate is of 'south'"),
        (certificate(issuer=(stranger, "north")), "another authority that calls itself 'north' too"),
        (certificate(name="press-07"), "not for signing releases"),
        (certificate(usage=ExtendedKeyUsageOID.CLIENT_AUTH), "not for signing releases"),
        (certificate(usage=None), "not for signing releases"),
        (certificate(key=keys.new_site_key()), "not for signing releases"),
        (certificate(until=keys.now() - timedelta(days=1)), "and its certificate is valid from"),
        (certificate(since=keys.now() + timedelta(days=1)), "and its certificate is valid from"),
    )
    for given, words in refused:
        with pytest.raises(TrustError, match=words):
            check_certificate("trunk", given, AUTHORITY, keys.now())
    check_certificate("trunk", certificate(), AUTHORITY, keys.now())


def test_a_certificate_with_a_key_of_another_kind_signs_nothing() -> None:
    odd = signature().model_copy(
        update={"certificate": keys.certificate_pem(certificate(key=keys.new_site_key())).decode()}
    )
    verdict = verify_signature("trunk", odd, CARD, ARRAYS, AUTHORITY)
    assert not verdict.right and "not for signing releases" in verdict.text


def test_a_digest_follows_names_order_shapes_and_bytes() -> None:
    first, second = np.zeros(2, np.float32), np.ones(2, np.float32)
    digests = [
        digest_arrays(Arrays(arrays))
        for arrays in (
            {"a": first, "b": second},
            {"b": second, "a": first},
            {"a": second, "b": first},
            {"a": first.reshape(1, 2), "b": second},
            {"a": first.astype(np.float64), "b": second},
        )
    ]
    assert len(set(digests)) == 5
    assert digest_arrays(Arrays({"a": first.copy(), "b": second.copy()})) == digests[0]
