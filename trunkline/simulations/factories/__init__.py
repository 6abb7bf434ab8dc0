"""Data sets as real site folders: what `trunkline sites` writes is what a plant would set up by hand."""

from pathlib import Path

from trunkline.errors import ConfigError, DataError, nearest
from trunkline.simulations.factories import (
    ai4i2020,
    alarms,
    cmapss,
    cwru,
    flowmeters,
    garments,
    hydraulic,
    skab,
    steel_energy,
    steel_plates,
    synthetic,
    tep,
)
from trunkline.simulations.factories.folder import Factory, Wish

FACTORIES: dict[str, Factory] = {
    "synthetic": Factory(
        synthetic.write,
        needs_data=False,
        about="made-up plants that wear out by one law under different sensors; 4 plants, or any number",
    ),
    "cmapss": Factory(
        cmapss.write, needs_data=True, about="NASA turbofan engines run to failure; 4 plants, or any multiple of 4"
    ),
    "ai4i2020": Factory(ai4i2020.write, needs_data=True, about="a milling machine's failures; 3 part qualities"),
    "alarms": Factory(alarms.write, needs_data=True, about="alarms to come at 20 real packaging machines"),
    "cwru": Factory(cwru.write, needs_data=True, about="damaged bearings by their vibration; 4 motor loads"),
    "flowmeters": Factory(flowmeters.write, needs_data=True, about="the condition of 4 real flowmeters"),
    "garments": Factory(garments.write, needs_data=True, about="daily output of 12 real sewing teams"),
    "hydraulic": Factory(
        hydraulic.write, needs_data=True, about="a hydraulic rig's wear; 3 states of its cooler, or 1 plant"
    ),
    "skab": Factory(skab.write, needs_data=True, about="a water circulation rig disturbed in 3 ways"),
    "steel_energy": Factory(
        steel_energy.write, needs_data=True, about="a steel works' energy to come; 4 quarters of a year"
    ),
    "steel_plates": Factory(steel_plates.write, needs_data=True, about="surface faults of 2 real grades of steel"),
    "tep": Factory(tep.write, needs_data=True, about="a simulated chemical plant; 3 sites of 7 faults each"),
}


def write_sites(
    name: str,
    out: Path,
    *,
    data: Path | None = None,
    plants: int | None = None,
    groups: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write the site folders of data set `name` below `out`; equal arguments give equal bytes.

    Args:
        data: folder with the data set's files, for one that needs it.
        plants: number of sites the groups are dealt to; None: as the data set comes.
        groups: labelled groups (engines, runs) each plant has to learn from, validation included; None: all of them.
        seed: of every random choice.

    Returns:
        The folders, each with site.toml and its data, in the data set's own order.

    Raises:
        ConfigError: an unknown name, a number that cannot be dealt, or `out` holds something else.
        DataError: the data set's files are not where `data` says.
    """
    if name not in FACTORIES:
        names = ", ".join(sorted(FACTORIES))
        raise ConfigError(f"unknown data set {name!r}{nearest(name, FACTORIES)} Known: {names}.")
    factory = FACTORIES[name]
    if factory.needs_data and data is not None and not data.is_dir():
        raise DataError(f"{data}: no such folder. Give --data the folder that holds the files of {name}.")
    return factory.write(out, Wish(data, plants, groups, seed))


__all__ = ["FACTORIES", "Factory", "write_sites"]
