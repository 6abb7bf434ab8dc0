"""The models a site's gate may choose from, beside the federated one and the local baseline: all made at the site, none exchanged.

Interpolating weights after fine-tuning: Wortsman et al. 2022, arXiv:2109.01903. Training only the heads at the end:
Oh et al. 2022, arXiv:2106.06042.
"""

import copy

import torch

from trunkline.client.site import Site
from trunkline.client.training.loop import train_site
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import AgreedRequest
from trunkline.protocol.plan import LocalPlan, ModelPart, Phase

QUARTERS = (1, 2, 4)  # after so many quarters of the fine-tuning a version is kept: stopping early is a choice as well
MIXES = (0.25, 0.5, 0.75)  # shares of the fine-tuned weights in the average of the two


def _only(plan: LocalPlan, parts: tuple[ModelPart, ...], steps: int, rate: float = 1.0) -> LocalPlan:
    """So many steps in which `parts` train together, with no pull to anybody."""
    changes = {
        "phases": (Phase(parts=parts),),
        "steps": steps,
        "epochs": None,
        "learning_rate": plan.learning_rate * rate,
        "private_rate": 1.0,
        "proximal": 0.0,
        "personal": 0.0,
    }
    return plan.model_copy(update=changes)


def finish(site: Site, model: TrunkModel, request: AgreedRequest) -> None:
    """Train `finish_parts` alone for `finish_steps`, in place: what a strategy left out of the rounds on purpose."""
    plan = request.plan
    if plan.finish_steps:
        last = _only(plan, plan.finish_parts, plan.finish_steps, plan.finish_rate)
        _train(site, request, model, last, seed_of(request.seed, site.name, "finish"), 0, 1)


def versions(site: Site, federated: TrunkModel, request: AgreedRequest) -> dict[str, dict[str, TrunkModel]]:
    """`finetuned` and `fused`, each in a few versions of which validation picks one a task; none where the plan has no such steps.

    Returns:
        candidate -> version -> model.
    """
    plan = request.plan
    if not plan.finetune_steps:
        return {}
    quarter = max(1, round(plan.finetune_steps / QUARTERS[-1]))
    gentle = _only(plan, ("stem", "trunk", "heads"), quarter, plan.finetune_rate)
    model, tuned = copy.deepcopy(federated), {}
    for done in range(QUARTERS[-1]):
        _train(site, request, model, gentle, seed_of(request.seed, site.name, "finetune", done), done, QUARTERS[-1])
        if done + 1 in QUARTERS:
            tuned[f"{(done + 1) * quarter} steps"] = copy.deepcopy(model)
    fused = {f"{share:g} fine-tuned": mixed(federated, model, share) for share in MIXES}
    return {"finetuned": tuned, "fused": fused}


def mixed(start: TrunkModel, tuned: TrunkModel, share: float) -> TrunkModel:
    """The model whose every weight is (1 - share) of `one` and `share` of `other`; counters are those of `one`."""
    model, tuned_values = copy.deepcopy(start), tuned.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # views: writing here changes the model
            if tensor.is_floating_point():
                tensor.lerp_(tuned_values[name], share)
    return model


def _train(
    site: Site, request: AgreedRequest, model: TrunkModel, plan: LocalPlan, seed: int, done: int, rounds: int
) -> None:
    data, tasks = site.resident(site.rows(request)), site.data.tasks
    train_site(model, data, tasks, plan, seed=seed, done=done, rounds=rounds)
