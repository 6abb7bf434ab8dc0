"""A release is what the centre signed, or it is refused and the text says what is wrong with it."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.app import Message
from typer.testing import CliRunner

from tests.client.adaptation.wearing import RUN, plant
from tests.loopback import WatchedGrid, events_of, federate, refusals_of, trunk_of
from tests.server.signed import Federation, named, small
from trunkline import __version__
from trunkline.cli.app import app
from trunkline.config.site import SITE_SCHEMA
from trunkline.errors import StorageError, TamperError, TrustError
from trunkline.protocol.messages import PROTOCOL
from trunkline.release import KEY, RELEASE, open_release, read_release, verify_release, write_release, write_tensors
from trunkline.security.encryption import is_sealed, make_seal
from trunkline.security.keys import certificate_pem, key_pem, sign
from trunkline.security.signatures import RELEASES, Signature, sign_release
from trunkline.server.releases import signing
from trunkline.server.releases.lineage import figures_of
from trunkline.server.releases.signing import CERTIFICATE, find_signer, issue_release_certificate, write_signer
from trunkline.server.reporting.records import RoundRecord

MINE, OTHER = Federation.of("north"), Federation.of("south")
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def signed(path: Path, mine: Federation = MINE, seed: int = 0, certificate: x509.Certificate | None = None) -> Path:
    """A release as a centre of `mine` signs it."""
    arrays, card = small(seed)
    made = certificate or mine.certificate()
    at = made.not_valid_before_utc + timedelta(hours=1)
    write_release(path, arrays, card, lambda card, arrays: sign_release(mine.release, made, card, arrays, at))
    return path


def parts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()[KEY])  # noqa: SIM118


def rewrite(path: Path, tensors: dict[str, np.ndarray], about: dict[str, Any]) -> Path:
    write_tensors(path, tensors, {KEY: json.dumps(about)})
    return path


def certificate(
    name: str = RELEASES, usage: x509.ObjectIdentifier | None = None, public: Any = None
) -> x509.Certificate:
    """Of the right authority, and wrong in one thing."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(MINE.authority.subject)
        .public_key(public or MINE.release.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(MINE.key, SHA384())


# --- the file ----------------------------------------------------------------------------------------------------


def test_what_was_signed_is_read_and_said_to_be_right(tmp_path: Path) -> None:
    arrays, card = small()
    path = signed(tmp_path / RELEASE)
    found, said = read_release(path, MINE.authority)
    assert list(found) == list(arrays)
    assert found.digest() == arrays.digest()
    assert said == card
    verdict = verify_release(path, MINE.authority)
    assert verdict.right
    assert (verdict.federation, verdict.problem) == ("north", None)
    assert datetime.fromisoformat(verdict.signed_at).tzinfo is not None
    tensors, _ = parts(path)  # safetensors itself, which knows nothing of signatures
    assert set(tensors) == set(arrays)


def test_equal_arguments_give_equal_bytes_but_for_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = find_signer(MINE.centre(tmp_path / "centre"))
    assert signer is not None
    arrays, card = small()
    written = []
    # not before this second, in which the certificate was made
    first = datetime.now(UTC) + timedelta(minutes=1)
    for at in (first, first, first + timedelta(minutes=1)):
        monkeypatch.setattr(signing, "now", lambda at=at: at)
        write_release(tmp_path / RELEASE, arrays, card, signer.sign)
        written.append((tmp_path / RELEASE).read_bytes())
    assert written[0] == written[1] != written[2]


def test_without_an_authority_it_is_read_but_nothing_vouches_for_it(tmp_path: Path) -> None:
    path = signed(tmp_path / RELEASE)
    assert read_release(path)[1] == small()[1]
    verdict = verify_release(path, None)
    assert not verdict.right
    assert "by its own words for 'north', but there is nothing to check that against" in verdict.text


def test_any_byte_that_is_changed_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    """Every byte of the file once: length, names, shapes, offsets, card, signature, certificate, arrays."""
    whole = signed(tmp_path / RELEASE).read_bytes()
    arrays, card = small()
    path = tmp_path / "changed.safetensors"
    random = np.random.default_rng(0)
    passed = []
    for place in range(len(whole)):
        mask = int(random.choice([1, 2, 4, 8, 16, 32, 64, 128, random.integers(1, 256)]))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            found, said = read_release(path, MINE.authority)
        except (TrustError, StorageError):
            continue
        assert (found.digest(), list(found), said) == (arrays.digest(), list(arrays), card), (place, mask)
        passed.append(place)
    assert len(passed) < len(whole) / 100  # another sort of blank, the case of a digit


def test_a_card_that_was_edited_is_named(tmp_path: Path) -> None:
    tensors, about = parts(signed(tmp_path / RELEASE))
    about["text"] = about["text"].replace('"plant-2"', '"plant-9"')
    with pytest.raises(TamperError, match="its card was altered after it was signed"):
        read_release(rewrite(tmp_path / "x", tensors, about), MINE.authority)
    about["text"] = "{}"
    with pytest.raises(TamperError, match="its card was altered after it was signed"):
        read_release(rewrite(tmp_path / "x", tensors, about), MINE.authority)


def test_arrays_that_were_edited_or_put_in_another_order_are_named(tmp_path: Path) -> None:
    tensors, about = parts(signed(tmp_path / RELEASE))
    for edited in ({"trunk.a.bias": tensors["trunk.a.bias"] + 1}, {"trunk.a.bias": tensors["trunk.a.bias"] * np.nan}):
        path = rewrite(tmp_path / "x", {**tensors, **edited}, about)
        with pytest.raises(TamperError, match="its arrays were altered after it was signed"):
            read_release(path, MINE.authority)
        with pytest.raises(TamperError):
            read_release(path)  # whoever has no authority notices that much
        with pytest.raises(TamperError):
            read_release(path, MINE.authority, unsigned="allow")
    with pytest.raises(TamperError, match="its arrays were altered"):
        read_release(rewrite(tmp_path / "x", tensors, {**about, "names": about["names"][::-1]}), MINE.authority)


def test_a_signature_of_another_file_is_none(tmp_path: Path) -> None:
    tensors, about = parts(signed(tmp_path / "one"))
    others, theirs = parts(signed(tmp_path / "two", seed=1))
    path = rewrite(tmp_path / "x", tensors, {**about, "signature": theirs["signature"]})
    with pytest.raises(TamperError, match="its signature is of another file"):
        read_release(path, MINE.authority)
    with pytest.raises(TamperError, match="its arrays were altered"):
        read_release(rewrite(tmp_path / "x", others, about), MINE.authority)


@pytest.mark.parametrize("change", ["signed_at", "value", "card"])
def test_what_a_signature_says_of_itself_is_signed_too(tmp_path: Path, change: str) -> None:
    tensors, about = parts(signed(tmp_path / RELEASE))
    new = {"signed_at": "2020-01-01T00:00:00+00:00", "value": "0" * 128, "card": "0" * 64}[change]
    about["signature"][change] = new
    with pytest.raises(TamperError, match="not made with the key of its certificate"):
        read_release(rewrite(tmp_path / "x", tensors, about), MINE.authority)


def test_what_was_signed_as_something_else_is_no_release(tmp_path: Path) -> None:
    tensors, about = parts(signed(tmp_path / RELEASE))
    statement = Signature.model_validate(about["signature"]).statement
    assert about["signature"]["value"] == sign(MINE.release, "release", statement)
    about["signature"]["value"] = sign(MINE.release, "manifest", statement)
    with pytest.raises(TamperError, match="not made with the key of its certificate"):
        read_release(rewrite(tmp_path / "x", tensors, about), MINE.authority)


def test_a_time_without_a_zone_and_a_certificate_that_is_none_are_damage(tmp_path: Path) -> None:
    tensors, about = parts(signed(tmp_path / RELEASE))
    for change in ({"signed_at": "2026-05-01T10:00:00"}, {"certificate": "none"}):
        altered = {**about, "signature": {**about["signature"], **change}}
        with pytest.raises(TamperError, match="its signature is damaged or was altered"):
            read_release(rewrite(tmp_path / "x", tensors, altered), MINE.authority)


def test_what_nobody_signed_is_refused_where_there_is_an_authority(tmp_path: Path) -> None:
    arrays, card = small()
    path = tmp_path / RELEASE
    write_release(path, arrays, card)
    with pytest.raises(TrustError, match=r"nobody signed it.*--unsigned"):
        read_release(path, MINE.authority)
    assert read_release(path, MINE.authority, unsigned="allow")[1] == read_release(path)[1] == card
    tensors, about = parts(signed(tmp_path / "signed"))
    del about["signature"]
    with pytest.raises(TrustError, match="nobody signed it"):
        read_release(rewrite(path, tensors, about), MINE.authority)


def test_format_1_is_still_read_and_said_to_be_unsigned(tmp_path: Path) -> None:
    arrays, card = small()
    table = card.model_dump(mode="json", exclude={"lineage"}) | {"format": 1}
    path = rewrite(tmp_path / RELEASE, dict(arrays), {"card": table, "names": list(arrays)})
    found, said = read_release(path)
    assert (found.digest(), said) == (arrays.digest(), card.model_copy(update={"format": 1, "lineage": None}))
    assert "format 1, which nobody could sign yet" in verify_release(path, None).text
    with pytest.raises(TrustError, match="format 1"):
        read_release(path, MINE.authority)
    # a signature is not for the taking by calling a new file an old one
    _, about = parts(signed(tmp_path / "signed"))
    with pytest.raises(TrustError, match="format 1"):
        read_release(
            rewrite(path, dict(arrays), {"card": table, "names": list(arrays), "signature": about["signature"]}),
            MINE.authority,
        )


# --- the certificate -----------------------------------------------------------------------------------------------


def test_another_federations_release_is_foreign(tmp_path: Path) -> None:
    path = signed(tmp_path / RELEASE, OTHER)
    with pytest.raises(
        TrustError, match=r"signed by another federation: its certificate is of 'south', expected 'north'"
    ):
        read_release(path, MINE.authority)
    namesake = Federation.of("north")
    with pytest.raises(TrustError, match="another authority that calls itself 'north' too"):
        read_release(signed(path, namesake), MINE.authority)
    assert read_release(path, MINE.authority, unsigned="allow")[1] == small()[1]


@pytest.mark.parametrize(
    "wrong",
    [
        certificate(usage=ExtendedKeyUsageOID.CLIENT_AUTH),
        certificate(),
        certificate(name="press-07", usage=ExtendedKeyUsageOID.CODE_SIGNING),
    ],
    ids=["for clients", "for anything", "of a site"],
)
def test_a_certificate_that_is_not_for_releases_signs_none(tmp_path: Path, wrong: x509.Certificate) -> None:
    with pytest.raises(TrustError, match="not for signing releases"):
        read_release(signed(tmp_path / RELEASE, certificate=wrong), MINE.authority)


def test_a_key_of_another_kind_signs_nothing(tmp_path: Path) -> None:
    wrong = certificate(usage=ExtendedKeyUsageOID.CODE_SIGNING, public=MINE.key.public_key())
    with pytest.raises(TrustError, match="not for signing releases"):
        read_release(signed(tmp_path / RELEASE, certificate=wrong), MINE.authority)


def test_it_is_the_time_of_signing_that_counts(tmp_path: Path) -> None:
    """A release outlives the certificate it was signed with; what was signed after its end is no release."""
    made, arrays_card = MINE.certificate(days=1), small()
    for hours, right in ((-1, False), (1, True), (23, True), (25, False)):
        at = made.not_valid_before_utc + timedelta(hours=hours)
        path = tmp_path / f"{hours}"
        write_release(
            path, *arrays_card, lambda card, arrays, at=at: sign_release(MINE.release, made, card, arrays, at)
        )
        verdict = verify_release(path, MINE.authority)
        assert verdict.right == right
        assert right or "and its certificate is valid from" in verdict.text


# --- the centre's key ----------------------------------------------------------------------------------------------


def test_a_centre_without_a_federation_has_no_signer(tmp_path: Path) -> None:
    assert find_signer(tmp_path) is None


def test_a_key_lies_sealed_where_the_state_is(tmp_path: Path) -> None:
    state = tmp_path / "centre"
    make_seal(state, f"file:{tmp_path / 'seal.key'}")
    MINE.centre(state)
    assert is_sealed((state / "release.key").read_bytes())
    signer = find_signer(state)
    assert signer is not None
    assert key_pem(signer.key) == key_pem(MINE.release)
    (state / "release.key").write_bytes(key_pem(MINE.release))
    with pytest.raises(TrustError, match="not encrypted"):
        find_signer(state)


def test_a_key_that_cannot_be_used_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = MINE.centre(tmp_path / "centre", days=30)
    (state / "release.key").chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        find_signer(state)
    (state / "release.key").chmod(0o600)
    write_signer(state, OTHER.release, MINE.certificate())
    with pytest.raises(TrustError, match=r"to another key than release\.key"):
        find_signer(state)
    write_signer(state, OTHER.release, OTHER.certificate())
    with pytest.raises(TrustError, match=r"certificate is of 'south', expected 'north'"):
        find_signer(state)
    write_signer(state, MINE.release, certificate(usage=ExtendedKeyUsageOID.SERVER_AUTH))
    with pytest.raises(TrustError, match="not for signing releases"):
        find_signer(state)
    (state / CERTIFICATE).unlink()
    with pytest.raises(TrustError, match=r"release\.crt: no such file"):
        find_signer(state)
    write_signer(state, MINE.release, MINE.certificate(days=30))
    monkeypatch.setattr("trunkline.security.keys.now", lambda: datetime.now(UTC) + timedelta(days=31))
    monkeypatch.setattr(signing, "now", lambda: datetime.now(UTC) + timedelta(days=31))
    with pytest.raises(TrustError, match="releases are signed with has expired on"):
        find_signer(state)


def test_a_certificate_is_for_releases_and_nothing_else() -> None:
    made = issue_release_certificate(MINE.key, MINE.authority, MINE.release.public_key(), days=10)
    assert (made.not_valid_after_utc - made.not_valid_before_utc) == timedelta(days=10)
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CODE_SIGNING]
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


# --- the lineage ---------------------------------------------------------------------------------------------------


def record(round: int, **losses: float) -> RoundRecord:
    metrics = {site: {"validation_loss": loss} for site, loss in losses.items()}
    return RoundRecord(round, sorted(losses), [], 1.0, 0, 0, None, metrics)


def test_a_figure_is_of_three_sites_or_is_not_told() -> None:
    assert figures_of([record(1, a=1.0, b=2.0)]) == {}
    assert figures_of([record(1, a=1.0, b=2.0, c=float("nan"))]) == {}
    found = figures_of([record(1, a=1.0, b=2.0, c=6.0), record(2, a=0.5, b=0.5)])["validation_loss"]
    assert (found.round, found.sites, found.mean) == (1, 3, pytest.approx(3.0))
    three = [record(1, a=1.0, b=2.0, c=6.0), record(2, a=1.0, b=1.0, c=4.0, d=float("inf"))]
    found = figures_of(three)["validation_loss"]
    assert (found.round, found.sites, found.mean) == (2, 3, pytest.approx(2.0))
    assert np.isfinite(figures_of([record(1, a=1e308, b=1e308, c=1e308)])["validation_loss"].mean)


def test_a_run_ends_with_a_signed_release_that_says_what_happened(tmp_path: Path) -> None:
    """plant-2 sends NaN in round 2 and is refused in that one; the card has it one round less than the others."""
    folders = [plant(tmp_path / f"p{seed}", 3, seed) for seed in (1, 2, 3)]
    out = tmp_path / "out"
    grid = WatchedGrid(folders, out)

    def lie(message: Message, honest: Any) -> Message:
        reply: Message = honest()
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            from trunkline.flower.records import open_records, to_records

            arrays, header, metrics = open_records(reply.content)
            reply.content = to_records({name: array * np.nan for name, array in arrays.items()}, header, metrics)
        return reply

    grid.tamper = {sorted(grid.get_node_ids())[1]: lie}
    settings = {**RUN, "rounds": 3, "training": {"steps": 2}, "report": {"baseline": True}}
    federate(folders, out, grid=grid, centre=MINE.centre(tmp_path / "centre"), **settings)
    assert {round: set(sites) for round, sites in refusals_of(out).items()} == {1: set(), 2: {"plant-2"}, 3: set()}
    arrays, card = read_release(out / RELEASE, MINE.authority)
    assert arrays.digest() == trunk_of(out).digest()
    lineage = card.lineage
    assert lineage is not None
    assert lineage.rounds == 3
    assert {site: part.rounds for site, part in lineage.by_site().items()} == {"plant-1": 3, "plant-2": 2, "plant-3": 3}
    asked = {json.loads(content_header(content))["contract"] for kind, _, content in grid.down if kind == "train"}
    assert {part.contract for part in lineage.parts} == asked
    assert lineage.digest == arrays.digest()
    assert (lineage.protocol, lineage.site_schema) == (PROTOCOL, SITE_SCHEMA)
    assert lineage.versions["trunkline"] == __version__
    assert {"torch", "numpy", "flwr"} < set(lineage.versions)
    curves = json.loads((out / "report.json").read_text())["rounds"][-1]["curves"]
    for name, figure in lineage.figures.items():
        assert (figure.round, figure.sites) == (3, 3)
        assert figure.mean == pytest.approx(np.mean([curves[site][name] for site in curves]))
    assert set(lineage.figures) == {"validation_loss", "local_validation_loss"}
    assert verify_release(out / RELEASE, MINE.authority).right
    with pytest.raises(TrustError, match="another federation"):
        read_release(out / RELEASE, OTHER.authority)


def content_header(content: Any) -> str:
    from trunkline.flower.records import open_records

    return open_records(content)[1]


def test_a_centre_without_a_key_says_so_and_releases_unsigned(tmp_path: Path) -> None:
    (tmp_path / "centre").mkdir()
    federate([plant(tmp_path / "p1", 3, 1)], tmp_path / "out", centre=tmp_path / "centre", **{**RUN, "rounds": 1})
    assert any("is not signed" in one.get("text", "") for one in events_of(tmp_path / "out") if one["event"] == "note")
    release = open_release(tmp_path / "out" / RELEASE)
    assert "nobody signed it" in release.verdict.text
    assert release.card.lineage is not None
    assert release.card.lineage.figures == {}  # of one site


def test_a_centre_whose_key_is_no_good_does_not_start_to_train(tmp_path: Path) -> None:
    centre = MINE.centre(tmp_path / "centre")
    (centre / "release.key").write_bytes(b"nothing")
    with pytest.raises(TrustError, match="not a private key"):
        federate([plant(tmp_path / "p1", 3, 1)], tmp_path / "out", centre=centre, **{**RUN, "rounds": 1})
    assert [one["event"] for one in events_of(tmp_path / "out")] == ["error"]


def test_a_certificate_that_ends_during_a_run_costs_a_resume_and_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, out = [plant(tmp_path / "p1", 3, 1)], tmp_path / "out"
    centre = MINE.centre(tmp_path / "centre", days=1)
    signer = find_signer(centre)
    assert signer is not None
    later = datetime.now(UTC) + timedelta(days=2)
    with monkeypatch.context() as moved:
        moved.setattr("trunkline.server.app.find_signer", lambda state: signer)
        for place in ("trunkline.security.keys.now", "trunkline.server.releases.signing.now"):
            moved.setattr(place, lambda: later)
        with pytest.raises(TrustError, match="has expired"):
            federate(folders, out, centre=centre, **{**RUN, "rounds": 1})
    assert not (out / RELEASE).exists()
    MINE.centre(centre)
    federate(folders, out, centre=centre, resume=True, **{**RUN, "rounds": 1})
    assert read_release(out / RELEASE, MINE.authority)[0].digest() == trunk_of(out).digest()


def test_the_figures_of_a_cohort_stay_home(tmp_path: Path) -> None:
    """Beside everybody's mean, that of all but one would tell the one's: only the trunk of all sites has figures."""
    folders = [plant(tmp_path / f"p{seed}", 3, seed) for seed in (1, 2, 3, 4)]
    settings = {**RUN, "rounds": 2, "training": {"steps": 2}, "strategy": {"name": "clustered", "warm_rounds": 1}}
    federate(folders, tmp_path / "out", centre=MINE.centre(tmp_path / "centre"), **settings)
    files = sorted((tmp_path / "out").glob("trunk-*.safetensors"))
    assert files
    for file in files:
        _, card = read_release(file, MINE.authority)
        assert card.lineage is not None
        assert card.lineage.figures == {}
        assert tuple(card.lineage.by_site()) == card.sites
    everybody = read_release(tmp_path / "out" / RELEASE, MINE.authority)[1].lineage
    assert everybody is not None
    assert everybody.figures["validation_loss"].sites == 4


# --- the command ---------------------------------------------------------------------------------------------------


def verify(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["trunk", "verify", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split()) + str(done.exception or "")


def test_the_command_shows_the_card_and_ends_with_0_only_where_it_is_right(tmp_path: Path) -> None:
    path = signed(tmp_path / RELEASE)
    (tmp_path / "authority.crt").write_bytes(certificate_pem(MINE.authority))
    code, text = verify(path, "--authority", tmp_path / "authority.crt")
    assert code == 0, text
    for word in ("run press", "7 done", "plant-2 6 of 7", "torch 2.9.0", "clip (norm 1.5); noise", "epsilon 3.0"):
        assert word in text
    assert small()[0].digest() in text
    assert "Verified" in text
    MINE.join(tmp_path / "site" / ".trunkline")
    assert verify(path, "--site", tmp_path / "site")[0] == 0
    code, text = verify(path)
    assert code == 1
    assert "Not verified" in text
    assert "nothing to check that against" in text
    code, text = verify(signed(tmp_path / "foreign", OTHER), "--authority", tmp_path / "authority.crt")
    assert code == 1
    assert "another federation" in text
    tensors, about = parts(path)
    code, text = verify(
        rewrite(tmp_path / "x", {**tensors, "trunk.a.bias": tensors["trunk.a.bias"] + 1}, about),
        "--site",
        tmp_path / "site",
    )
    assert code == 1
    assert "arrays were altered" in text


def test_the_command_says_whose_signature_it_lacks(tmp_path: Path) -> None:
    path = signed(tmp_path / RELEASE)
    (tmp_path / "site").mkdir()
    assert "has not joined a federation" in verify(path, "--site", tmp_path / "site")[1]
    assert "no such file" in verify(path, "--authority", tmp_path / "absent.crt")[1]
    assert "drop one of the two" in verify(path, "--authority", tmp_path / "a", "--site", tmp_path / "site")[1]
    assert "no such file" in verify(tmp_path / "absent")[1]


def test_a_card_cannot_steer_the_terminal(tmp_path: Path) -> None:
    arrays, card = small()
    write_release(tmp_path / RELEASE, arrays, card.model_copy(update={"run": "x\x1b[2J[red]y"}))
    _, text = verify(tmp_path / RELEASE)
    assert "\x1b[2J" not in text
    assert "[red]y" in text


# --- a plant -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    settings = {**RUN, "rounds": 1}
    federate([plant(folder / "p1", 3, 1)], folder / "out", centre=MINE.centre(folder / "centre"), **settings)
    return folder / "out" / RELEASE


def adapt(folder: Path, trunk: Path, *more: object) -> tuple[int, str]:
    arguments = ["adapt", str(folder), "--trunk", str(trunk), "--out", str(folder.parent / "made"), *map(str, more)]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, " ".join(done.output.split()) + str(done.exception or "")


def test_a_plant_that_joined_takes_its_own_centres_trunk_and_no_other(tmp_path: Path, release: Path) -> None:
    ours, theirs = plant(tmp_path / "ours", 1, 9), plant(tmp_path / "theirs", 1, 9)
    MINE.join(ours / ".trunkline")
    OTHER.join(theirs / ".trunkline")
    code, text = adapt(ours, release)
    assert code == 0, text
    assert "Verified:" in text
    code, text = adapt(theirs, release)
    assert code == 1
    assert "signed by another federation" in text
    assert not (tmp_path / "made" / "theirs").exists()
    code, text = adapt(theirs, release, "--unsigned")
    assert code == 0, text
    assert "Not verified:" in text
    elsewhere = shutil.move(theirs / ".trunkline", tmp_path / "state")
    assert adapt(theirs, release, "--state", elsewhere)[0] == 1
    arrays, card = read_release(release)
    write_release(tmp_path / "unsigned", arrays, card)
    code, text = adapt(ours, tmp_path / "unsigned")
    assert code == 1
    assert "nobody signed it" in text
    tensors, about = parts(release)
    first = next(iter(tensors))
    altered = rewrite(tmp_path / "altered", {**tensors, first: tensors[first] + 1}, about)
    code, text = adapt(ours, altered, "--unsigned")
    assert code == 1
    assert "arrays were altered" in text


def test_a_plant_that_never_joined_is_told_that_nothing_was_checked(tmp_path: Path, release: Path) -> None:
    alone = plant(tmp_path / "alone", 1, 9)
    code, text = adapt(alone, release)
    assert code == 0, text
    assert "Not verified:" in text
    assert "nothing to check that against" in text
    evidence = json.loads((tmp_path / "made" / "evidence.json").read_text())["release"]
    assert evidence["verified"] is False
    assert evidence["digest"] == read_release(release)[0].digest()
