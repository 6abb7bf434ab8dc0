"""A code is made and read the same at both ends, and a mistyped one is refused."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.federation import issue
from trunkline.errors import TrustError
from trunkline.security import keys
from trunkline.security.enrolment import PREFIX, SECRET, Code

SECRETS = st.binary(min_size=SECRET, max_size=SECRET)


@given(SECRETS, st.binary(min_size=PREFIX, max_size=PREFIX), st.booleans())
def test_a_code_is_read_as_it_was_written_however_it_is_typed(secret: bytes, authority: bytes, lower: bool) -> None:
    code = Code(secret, authority)
    text = str(code).replace("-", " ") if lower else str(code)
    assert Code.parse(text.lower() if lower else text) == code
    assert Code.parse(text.replace("O", "0").replace("I", "1").replace("B", "8")) == code
    assert len(str(code).split("-")) == 11


@given(SECRETS, st.integers(0, 54))
def test_a_mistyped_or_incomplete_code_is_refused(secret: bytes, index: int) -> None:
    letters = str(Code(secret, bytes(PREFIX))).replace("-", "")
    changed = letters[:index] + ("A" if letters[index] != "A" else "C") + letters[index + 1 :]
    for text in (changed, letters[:index], ""):
        try:
            code = Code.parse(text)
        except TrustError as error:
            assert "incomplete or mistyped" in str(error)
        else:  # the last letter has bits that belong to no byte
            assert str(code).replace("-", "") == letters and index == 54
    with pytest.raises(TrustError):
        Code.parse("not a code!")


def test_both_ends_make_the_same_key_and_certificate_from_a_code() -> None:
    authority = issue(keys.new_site_key(), "authority", usage=None)
    code = Code.new(authority)
    again = Code.parse(str(code))
    assert keys.key_pem(code.key) == keys.key_pem(again.key)
    assert code.certificate() == again.certificate()
    assert keys.key_id(code.certificate().public_key()) == keys.key_id(code.key.public_key())
    other = Code(secrets.token_bytes(SECRET), code.authority)
    assert other.certificate().subject != code.certificate().subject
    assert code.names(authority) and not code.names(issue(keys.new_site_key(), "authority", usage=None))
