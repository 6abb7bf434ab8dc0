"""Which sites can be trained in one stack, and which are trained alone."""

from trunkline.client.round_models import local_request
from trunkline.client.site import Site
from trunkline.client.training.loop import steps_of
from trunkline.protocol.messages import TrainRequest
from trunkline.protocol.plan import LocalPlan

Kind = tuple[object, ...]
# Fields of LocalPlan that a stack honours. Every other field at anything but its default sends a site to single training,
# so that a new field is never silently ignored (tests/simulations/vectorized/test_eligibility.py holds both).
HONOURED = frozenset(
    ("phases", "steps", "epochs", "batch_size", "learning_rate", "private_rate", "weight_decay", "clip_norm", "schedule",
     "keep", "patience_rounds",
     # of what a site does alone after the last round, from the state that its stack left in the vault
     "finish_steps", "finish_parts", "finish_rate", "finetune_steps", "finetune_rate")
)  # fmt: skip


def kind_of(site: Site, request: TrainRequest) -> Kind | None:
    """Sites with equal kinds can be trained together; None: this one is trained alone, as `answer_train` does it."""
    requests = [request] + ([local_request(request)] if request.baseline else [])
    if request.about.guards or site.config.policy.metrics is not True:
        return None  # guards and policies are kept where each site answers for itself
    if any(unsupported(role.plan) for role in requests):
        return None
    if any(role.trunk.norm == "private" for role in requests):
        return None  # its running statistics follow one site's batches
    site.apply_conditions(request)
    data = site.resident(site.rows(request))
    if not len(data) or data.goes is not None:
        return None
    tasks = []
    for name, task in site.data.tasks.items():
        numbers = task.loss_numbers()
        if numbers is None:
            return None
        shapes = tuple((key, tuple(value.shape)) for key, value in numbers.items())
        tasks.append((name, task.config.model_dump_json(), task.outputs, shapes))
    steps = tuple(steps_of(role.plan, len(data)) for role in requests)
    reads = (site.config.data.window, len(site.data.channels), site.data.categories)
    return (*reads, tuple(tasks), steps)


def unsupported(plan: LocalPlan) -> list[str]:
    """The fields of `plan` that no stack honours and that are not at their default."""
    return [
        name
        for name, field in LocalPlan.model_fields.items()
        if name not in HONOURED and getattr(plan, name) != field.get_default()
    ]
