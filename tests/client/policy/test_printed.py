"""What a person at a plant reads of contracts and of the manifest, and what damaged files say."""

import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console

from tests.client.policy.test_egress import (  # noqa: F401 - fixtures
    Plant,
    a_process_of_flower,
    joined,
    plant,
)
from trunkline.client.policy import contracts, manifest
from trunkline.errors import ContractError, StorageError


def printed(show: Callable[[Console], None]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=400))
    return out.getvalue()


def test_a_contract_in_words_names_all_that_leaves(joined: Plant) -> None:  # noqa: F811
    consent = contracts.known(joined.state, "quick-1")
    text = printed(lambda console: contracts.print_contract(consent, console))
    for word in ("quick-1", "hannes", "fedper", "train_loss", "3, in each 1 steps", "accepted by policy"):
        assert word in text, text
    lines = printed(lambda console: contracts.print_contracts([consent], console))
    assert "quick-1" in lines and "accepted" in lines and "policy" in lines
    assert printed(lambda console: contracts.print_contracts([], console)).strip() == "No run has asked yet."


def test_a_run_without_results_says_that_none_leave(joined: Plant) -> None:  # noqa: F811
    consent = contracts.known(joined.state, "quick-1").model_copy(update={"report": False})
    assert "no results leave" in printed(lambda console: contracts.print_contract(consent, console))


def test_the_words_of_a_server_steer_no_terminal(joined: Plant) -> None:  # noqa: F811
    assert contracts.plain("a\x1b[2Jb\u202ec") == "a?[2Jb?c"
    consent = contracts.known(joined.state, "quick-1").model_copy(update={"by": "[red]\x1b[2Jme[/red]"})
    text = printed(lambda console: contracts.print_contracts([consent], console))
    assert "\x1b" not in text and "[red]" in text


def test_an_unknown_run_lists_the_known_ones(joined: Plant) -> None:  # noqa: F811
    with pytest.raises(ContractError, match=r"no contract of a run 'other'\. There are: quick-1"):
        contracts.known(joined.state, "other")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"site": 1}'])
def test_a_damaged_contract_is_named_with_its_remedy(joined: Plant, damage: str) -> None:  # noqa: F811
    path = joined.state / "contracts" / "quick-1.json"
    path.write_text(damage)
    with pytest.raises(StorageError, match=r"damaged .* Remove it; the run asks anew"):
        contracts.read(joined.state, "quick-1")


def test_a_contract_of_another_run_is_not_taken_for_this_one(joined: Plant) -> None:  # noqa: F811
    path = joined.state / "contracts" / "quick-1.json"
    path.with_name("quick-2.json").write_bytes(path.read_bytes())
    with pytest.raises(StorageError, match="is about run 'quick-1'"):
        contracts.read(joined.state, "quick-2")


def test_a_contract_that_cannot_be_read_is_a_storage_error(joined: Plant) -> None:  # noqa: F811
    path = joined.state / "contracts" / "quick-1.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        contracts.read(joined.state, "quick-1")


def test_a_manifest_is_a_line_a_reply_and_what_it_comes_to(joined: Plant) -> None:  # noqa: F811
    assert not joined.filter.check(*joined.trained()).has_error()
    links, signer = manifest.read_manifest(joined.state)
    text = printed(lambda console: manifest.print_manifest(links, signer, console))
    assert "offer" in text and "update" in text and "in 2 replies, to hannes at 10.0.0.5:9140" in text
    assert f"intact: 2 lines, signed by {signer[:16]}" in text
    first = json.loads(manifest.dumped(links[0]))
    assert first["n"] == links[0].number and first["kind"] == "offer" and first["hash"] == links[0].hash
    assert manifest.read_manifest(joined.state, "another") == ([], signer)


def test_a_manifest_shows_what_was_stopped(joined: Plant) -> None:  # noqa: F811
    request, reply = joined.trained(1, seed=2)  # other terms than the accepted ones
    joined.filter.check(request, reply)
    links, signer = manifest.read_manifest(joined.state)
    assert "error 2: ContractError: the terms of run" in printed(
        lambda console: manifest.print_manifest(links, signer, console)
    )


def test_before_anything_left_the_manifest_is_empty(plant: Plant) -> None:  # noqa: F811
    assert manifest.read_manifest(plant.state) == ([], "")
    text = printed(lambda console: manifest.print_manifest([], "", console))
    assert "to nobody" in text and "signed by nobody" in text
