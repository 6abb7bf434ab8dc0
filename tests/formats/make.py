"""How the samples of stored formats were made: run by hand, once for every format that is released, with the code of its day.

    python -m tests.formats.make DIR

makes all of them with the formats of the code as it is. What is new among them (a format number without a sample) goes
into tests/formats/vNUMBER, or wire/vNUMBER for the protocol; what lies there is never made again. The one exception is
v1/trunk.safetensors: by the time of the first of these samples releases had format 2, so it was made with
`trunkline/release.py` as of before lineage and signatures.

run/      the folder of a run that was cut off in its second round, with the state of its one site, in the clear
plant/    the sealed state of a plant that has trained a round: vault, contract, manifest, split, key of its records
centre/   the state of a federation: register with an invitation, audit log, sealed keys
"""

import base64
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from flwr.app import Message

import trunkline
from tests.loopback import WatchedGrid, federate
from trunkline.flower.app_archive import app_digest
from trunkline.flower.records import open_records

KEY = "TRUNKLINE_SAMPLE_KEY"
SEALED_WITH = base64.b64encode(b"of samples only, secret to none.").decode()
SETTINGS = {
    "operator": "samples",
    "rounds": 2,
    "trunk": {"width": 4},
    "training": {"steps": 1, "batch_size": 8, "keep": "last"},
    "lend": ["trunk", "stem", "heads"],
}
ROUND = 1  # that is done in run/ and plant/


class PowerCut(BaseException):
    """Not an Exception, so that nothing catches it."""


def cut(message: Message, honest):
    """Tamper of `WatchedGrid`: the power goes in the round after ROUND."""
    if message.metadata.message_type == "train" and json.loads(open_records(message.content)[1])["round"] > ROUND:
        raise PowerCut
    return honest()


def sites(folder: Path) -> list[Path]:
    """The site of the samples: tests make it again."""
    from trunkline.simulations.factories import write_sites

    return sorted(write_sites("synthetic", folder, groups=12))[:1]


def make(to: Path) -> None:
    os.environ[KEY] = SEALED_WITH
    plants = sites(to / "sites")
    site = plants[0].name
    centre(to / "centre")
    back_up(to / "centre", to / "backup.tar")
    with suppress(PowerCut):
        federate(plants, to / "run", tamper={2: cut}, **SETTINGS)
    sealed(plants, to / "sealed")
    (to / "sealed" / "state" / site).rename(to / "plant")
    signing = to / "signing"
    shutil.copytree(
        to / "centre", signing, ignore=shutil.ignore_patterns("federation.json")
    )  # nobody has to be enrolled
    wire(federate(plants, to / "whole", centre=signing, **SETTINGS), to / "wire")
    (to / "whole" / "trunk.safetensors").rename(to / "trunk.safetensors")
    model(plants[0], to / "model.safetensors")
    search(plants, to / "search.json")
    for folder in ("sites", "sealed", "signing", "whole", "searched"):
        shutil.rmtree(to / folder)
    for left in (
        "centre/server.key",
        "centre/loopback.key",
        "centre/registry.json.lock",
        "plant/pid",
        "run/events.jsonl",
    ):
        (to / left).unlink()


def centre(state: Path) -> None:
    from trunkline.server.membership import authority
    from trunkline.server.operations.run_store import RunStore

    authority.init(state, "Samples", ("127.0.0.1",), f"env:{KEY}")
    authority.Authority.open(state).invite("kiln-02", 1.0)
    RunStore(state).add("quick", json.dumps({"name": "quick", **SETTINGS}), Path("/srv/runs/quick"), resume=False)


def back_up(state: Path, file: Path) -> None:
    from trunkline.server.operations import backup

    backup.back_up(state, file)


def sealed(plants: list[Path], out: Path) -> None:
    from trunkline.client.state.at_rest import seal_state

    seal_state(out / "state" / plants[0].name, f"env:{KEY}")
    with suppress(PowerCut):
        grid = WatchedGrid(plants, out, {2: cut}, plant=True)
        federate(plants, out, grid=grid, **SETTINGS)


def model(site_dir: Path, path: Path) -> None:
    from trunkline.client.adaptation.model_file import write_model
    from trunkline.client.site import open_site
    from trunkline.protocol.messages import OfferRequest
    from trunkline.protocol.plan import LocalPlan, TrunkSpec

    site = open_site({"site": str(site_dir), "state": str(site_dir / "state")})
    spec = TrunkSpec(width=4)
    request = OfferRequest(run="sample", seed=1, rounds=1, trunk=spec, plan=LocalPlan(), lend=("trunk",))
    data = site.data
    write_model(
        path, site.model(request), spec, data.tasks, data.scaler, site.config.data.window, data.category_names, 1, {}
    )


def search(plants: list[Path], path: Path) -> None:
    from trunkline.config.run import parse_run
    from trunkline.simulations.simulate import simulate

    out = path.parent / "searched"
    table = {**SETTINGS, "name": "searched", "search": {"trials": 2, "space": {"trunk.dropout": [0.1, 0.2]}}}
    simulate(parse_run(table, "samples"), plants, out, workers=0, resume=False)
    (out / "search.json").rename(path)


def wire(grid: WatchedGrid, to: Path) -> None:
    """One header of each kind, as it went over the wire; requests of the kinds that only some runs ask from the factory."""
    from trunkline.config.run import parse_run
    from trunkline.server.rounds.requests import RequestFactory
    from trunkline.strategies import build_strategy

    to.mkdir()
    run = parse_run(
        {**SETTINGS, "name": "samples", "refit": True, "report": {"local": {"training.steps": 2}}}, "samples"
    )
    factory = RequestFactory.of(run, build_strategy(run.strategy.name, run.strategy.options, run.training), "samples-1")
    for request in (factory.offer(), factory.train(1), factory.fit(2), factory.decide(), factory.score()):
        (to / f"{request.kind}_request.json").write_text(request.model_dump_json() + "\n")
    (to / "app.sha256").write_text(app_digest(Path(trunkline.__file__).parent / "app") + "\n")
    for name, kind, contents in (
        ("offer", "query", grid.up), ("reply", "train", grid.up), ("scorecard", "evaluate", grid.up)
    ):  # fmt: skip
        header = next(open_records(content)[1] for one, _, content in contents if one == kind)
        (to / f"{name}.json").write_text(header + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
