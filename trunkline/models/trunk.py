"""The model of a site: a private stem, the trunk it lends, private heads; and the one partition between them.

Bodies that are shared while what is around them stays at the site: Arivazhagan et al. 2019, arXiv:1912.00818 (personal
heads); Liang et al. 2020, arXiv:2001.01523 (personal stems); Li et al. 2021, arXiv:2102.07623 (personal norm layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.errors import ConfigError, ContractError, StorageError, TrunklineError, nearest
from trunkline.models.backbones import BACKBONES
from trunkline.models.backbones.backbone import Backbone
from trunkline.models.norms import SiteNorm, group_norm
from trunkline.models.stems import STEMS
from trunkline.models.stems.raw import RawColumns
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.plan import ModelPart, TrunkSpec

if TYPE_CHECKING:  # the server builds first trunks without loading what tasks need
    from trunkline.models.tasks.task import Task

TRUNK_ONLY = ("trunk",)

Made = TypeVar("Made", bound=nn.Module)


class TrunkModel(nn.Module):
    """One site's network: sensors -> stem -> trunk -> one head a task.

    Args:
        stem: folds the site's own inputs to the trunk's width.
        trunk: the shared body; it owns no norm layer and no buffer.
        norms: the norm layers the trunk calls.
        heads: task name -> head.
        lend_norms: whether `norms` travel with the trunk or stay at the site, in the site's own scale and shift.

    Raises:
        ContractError: what the trunk would lend holds a buffer. A buffer follows the data of its site.
    """

    def __init__(
        self, stem: nn.Module, trunk: Backbone, norms: nn.ModuleList, heads: nn.ModuleDict, *, lend_norms: bool
    ) -> None:
        super().__init__()
        self.stem = stem
        self.trunk = trunk
        self.norms = norms
        self.heads = heads
        self.lend_norms = lend_norms
        self.lent(TRUNK_ONLY)  # refuse now rather than in round 1

    def embed(self, x: Tensor, categorical: Tensor | None = None) -> Tensor:
        """Inputs as the stem takes them -> (batch, width)."""
        out: Tensor = self.trunk(self.stem(x, categorical), self.norms)
        return out

    def forward(self, x: Tensor, categorical: Tensor | None = None) -> dict[str, Tensor]:
        """Windows (batch, channels, time) or rows (batch, columns) -> task name -> (batch, outputs)."""
        embedded = self.embed(x, categorical)
        return {task: head(embedded) for task, head in self.heads.items()}

    def _parts(self) -> dict[str, nn.Module]:
        """Every module under the name its arrays carry. `lent` and what stays are two views of this one list."""
        norms = "trunk.norms" if self.lend_norms else "norms"
        heads = {f"head.{task}": self.heads[task] for task in sorted(self.heads)}  # the same order at every site
        return {"trunk": self.trunk, norms: self.norms, "stem": self.stem, **heads}

    def lent(self, lend: tuple[str, ...] = TRUNK_ONLY) -> dict[str, nn.Module]:
        """The modules that `lend` names and this site has: THE partition, expressed once.

        Args:
            lend: "trunk", "stem", "heads" (all), "head.<task>". A head this site does not have lends nothing, and
                "scaler" is no module: its statistics travel beside the model, once.

        Raises:
            ConfigError: an item is none of these.
            ContractError: a lent module holds a buffer.
        """
        for item in lend:
            if item not in ("trunk", "stem", "heads", "scaler") and not (
                item.startswith("head.") and len(item) > len("head.")
            ):
                raise ConfigError(
                    f"`lend` names {item!r}. Whole modules only: 'trunk', 'stem', 'heads' or 'head.<task>'."
                )
        wanted = {*lend, "trunk.norms"} if "trunk" in lend else set(lend)
        if "heads" in lend:
            wanted |= {f"head.{task}" for task in self.heads}
        lent = {name: module for name, module in self._parts().items() if name in wanted}
        for name, module in lent.items():
            _refuse_buffers(name, module)
        return lent

    def _kept(self, lend: tuple[str, ...]) -> dict[str, nn.Module]:
        lent = self.lent(lend)
        return {name: module for name, module in self._parts().items() if name not in lent}

    def share(self, lend: tuple[str, ...] = TRUNK_ONLY) -> Arrays:
        """Copies of what is lent, float32, in a fixed order: all that may leave this site."""
        return _arrays(self.lent(lend))

    def adopt(self, arrays: Mapping[str, NDArray[np.generic]], lend: tuple[str, ...] = TRUNK_ONLY) -> None:
        """Put `arrays` where `share` takes them from; all of them, or none and an error.

        Raises:
            ContractError: a name, shape or dtype is not what `share` gives.
        """
        tensors = {name: tensor.detach() for name, tensor in _tensors(self.lent(lend))}
        _fill(tensors, arrays, np.dtype(np.float32), _not_the_trunk)

    def private(self, lend: tuple[str, ...] = TRUNK_ONLY) -> dict[str, NDArray[np.generic]]:
        """Copies of everything that is not lent, running statistics included: what the vault keeps."""
        return {name: _copy(tensor) for name, tensor in _tensors(self._kept(lend))}

    def restore(self, private: Mapping[str, NDArray[np.generic]], lend: tuple[str, ...] = TRUNK_ONLY) -> None:
        """Put back what `private` gave; all of it, or nothing and an error.

        Raises:
            StorageError: a name, shape or dtype is not what this model has.
        """
        tensors = {name: tensor.detach() for name, tensor in _tensors(self._kept(lend))}
        _fill(tensors, private, None, _not_this_site)

    def parameters_of(self, part: ModelPart) -> list[nn.Parameter]:
        """What trains when a phase names `part`. The norms belong to the trunk wherever they live."""
        modules: dict[ModelPart, tuple[nn.Module, ...]] = {
            "stem": (self.stem,), "trunk": (self.trunk, self.norms), "heads": (self.heads,),
        }  # fmt: skip
        return [parameter for module in modules[part] for parameter in module.parameters()]


def build_model(
    spec: TrunkSpec,
    *,
    window: int | None,
    channels: int,
    categories: tuple[int, ...] = (),
    tasks: Mapping[str, Task],
    seed: int,
    lend: tuple[str, ...] = TRUNK_ONLY,
) -> TrunkModel:
    """The model of one site, its start decided by `seed` and each module's own name.

    Sites with equal sensors and tasks therefore start from equal stems and heads (averaging them makes sense from the
    first round), and one more task changes no other module. The global random generator is left as it was.

    Args:
        spec: the run's trunk.
        window: rows a window, or None where every row is a sample. The model itself takes any length.
        channels: numeric inputs.
        categories: distinct codes of each categorical column, code 0 (unknown) included; rows only.
        tasks: fitted tasks by name.
        lend: what the run lends, as in `TrunkModel.lent`. A head that stays home begins where its labels say; one that
            is lent is the same at every site, because the server gets its first values before anything was averaged.

    Raises:
        ConfigError: an unknown backbone, or one that does not read this kind of sample.
    """
    reads = "rows" if window is None else "windows"
    body = _backbone(spec)
    if body.reads != reads:
        fitting = ", ".join(name for name, other in BACKBONES.items() if other.reads == reads)
        kind = "single rows (it has no `window`)" if window is None else f"windows of {window} rows"
        raise ConfigError(
            f"backbone {spec.backbone!r} reads {body.reads}, and this site's samples are {kind}. "
            f"Backbones that fit: {fitting}. Change `backbone` in run.toml, or `window` in site.toml."
        )
    trunk, norms = _body(spec, seed)
    stem: nn.Module
    if spec.columns is not None:
        stem = RawColumns(channels, categories, spec.columns)
    else:
        stem = _seeded(seed, "stem", lambda: STEMS[reads](channels, categories, trunk.width))
    heads = nn.ModuleDict()
    for name, task in tasks.items():
        heads[name] = _seeded(seed, f"head.{name}", lambda task=task: task.head(trunk.width))  # type: ignore[misc]
        if "heads" not in lend and f"head.{name}" not in lend:
            task.init_head(heads[name])
    return TrunkModel(stem, trunk, norms, heads, lend_norms=spec.norm == "group")


def first_trunk(spec: TrunkSpec, seed: int) -> Arrays:
    """What the server starts from: byte-equal to `build_model(spec, ..., seed=seed).share()` at any site.

    Raises:
        ConfigError: an unknown backbone.
    """
    trunk, norms = _body(spec, seed)
    return TrunkModel(nn.Identity(), trunk, norms, nn.ModuleDict(), lend_norms=spec.norm == "group").share()


def _backbone(spec: TrunkSpec) -> type[Backbone]:
    if spec.backbone not in BACKBONES:
        raise ConfigError(
            f"`backbone` is {spec.backbone!r}{nearest(spec.backbone, BACKBONES)} "
            f"Known backbones: {', '.join(BACKBONES)}. Change `[trunk]` in run.toml."
        )
    return BACKBONES[spec.backbone]


def _body(spec: TrunkSpec, seed: int) -> tuple[Backbone, nn.ModuleList]:
    """Backbone and norms, alike at every site and at the server."""
    body = _backbone(spec)
    trunk = _seeded(seed, "trunk", lambda: body.of(spec))
    norm = SiteNorm if spec.norm == "private" else group_norm
    return trunk, nn.ModuleList(norm(width) for width in trunk.norm_widths)


def _seeded(seed: int, name: str, make: Callable[[], Made]) -> Made:
    """`make()` with random numbers that depend on the seed and the module's name only; the global generator stays."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed_of(seed, name))  # not torch.manual_seed: that reseeds accelerators too
        return make()


def _refuse_buffers(name: str, module: nn.Module) -> None:
    if held := [buffer for buffer, _ in module.named_buffers()]:
        raise ContractError(
            f"`{name}` would be lent and holds the buffer `{held[0]}`. A buffer follows the data of its site and must "
            f'not travel: use GroupNorm, or `norm = "private"` in run.toml so that norm layers stay at the site.'
        )


def _tensors(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in parts.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"{prefix}.{name}", tensor


def tensors_of(model: TrunkModel) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under the name that `share` and `private` give it."""
    return list(_tensors(model._parts()))


def _copy(tensor: Tensor) -> NDArray[np.generic]:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    array: NDArray[np.generic] = tensor.detach().to("cpu", dtype, copy=True).numpy()
    return array


def _arrays(parts: Mapping[str, nn.Module]) -> Arrays:
    return Arrays({name: _copy(tensor) for name, tensor in _tensors(parts)})


def _not_the_trunk(complaint: str) -> TrunklineError:
    return ContractError(
        f"{complaint} Both ends must build the same trunk: compare `[trunk]` and `lend` of the run and the versions."
    )


def _not_this_site(complaint: str) -> TrunklineError:
    return StorageError(
        f"{complaint} The vault was written for another model: channels, tasks or trunk changed since. "
        f"Undo the change, or start a run of another name."
    )


def _fill(
    tensors: Mapping[str, Tensor],
    arrays: Mapping[str, NDArray[np.generic]],
    dtype: np.dtype[np.float32] | None,
    error: Callable[[str], TrunklineError],
) -> None:
    """Copy `arrays` into `tensors` after all of it fits; `dtype` None: that of each tensor."""
    if missing := [name for name in tensors if name not in arrays]:
        raise error(f"`{missing[0]}` should be there ({len(missing)} such arrays). Found {len(arrays)} others.")
    if extra := [name for name in arrays if name not in tensors]:
        raise error(f"`{extra[0]}` is not part of this model ({len(extra)} such arrays).")
    for name, tensor in tensors.items():
        array = arrays[name]
        if array.shape != tuple(tensor.shape):
            raise error(f"`{name}` should have shape {tuple(tensor.shape)}. Found {array.shape}.")
        expected = dtype or _copy(tensor).dtype
        if array.dtype != expected:
            raise error(f"`{name}` should have dtype {expected}. Found {array.dtype}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))  # a copy: what arrives is read-only
