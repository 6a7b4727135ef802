"""Which plan a session opens: the newest of those that fit. Opening never compiles."""

from __future__ import annotations

from dataclasses import replace

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.contract import symbols
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import BackendError
from dnp.engine.plans.build import build_command, settings_of
from dnp.engine.plans.compiler import REVISION
from dnp.engine.plans.plan import FOLDER, Plan
from dnp.engine.plans.profile import asked_for, from_dict, size_options
from dnp.engine.plans.settings import BuildSettings, Target
from dnp.engine.plans.store import PlanStore

_NAMED = 3  # plans that do not fit, in an error


def plan_for(bundle: Bundle, graph: GraphSpec, target: Target, store: PlanStore) -> Plan:
    """The newest plan in ``store`` of this very graph, by this compiler in this version, for the GPU of ``target``.

    Its sizes and settings are those it was built with. Verified.

    Raises BackendError where none fits, with what is there, what differs and what builds one; and for a plan that is
    damaged, since one of other sizes in its place would be a surprise.
    """
    plans = store.newest(graph.name, target.product.name)
    unlike = [(plan, _difference(plan, bundle, graph, target)) for plan in plans]
    fitting = next((plan for plan, difference in unlike if not difference), None)
    if fitting is not None:
        found, reason = store.find(fitting.spec)
        if found is not None:
            return found
        reason, command = reason or f"{fitting.path.name} is gone", _command(bundle, fitting, target, store)
        raise BackendError(f"the plan of {graph.name!r} cannot be used: {reason}; build it again: {command}")
    told = "; ".join(f"{plan.path.name}: {difference}" for plan, difference in unlike[:_NAMED])
    more = f"; and {len(plans) - _NAMED} more" if len(plans) > _NAMED else ""
    there = f"those there do not fit ({told}{more})" if plans else f"there is none in {store.folder}"
    command = _command(bundle, plans[0] if plans else None, target, store)
    raise BackendError(f"{target.product.name} needs a plan of {graph.name!r}, and {there}; build it: {command}")


def _difference(plan: Plan, bundle: Bundle, graph: GraphSpec, target: Target) -> str:
    """Why a plan cannot be opened, in words; empty when it can. Its sizes and settings are its own affair."""
    spec = plan.spec
    covered = target.product.portable and target.architecture in spec.architecture.split(",")
    wanted = replace(
        spec,
        graph_sha256=bundle.graph_sha256(graph.name),
        version=target.version,
        architecture=spec.architecture if covered else target.architecture,
        flags={**spec.flags, "revision": REVISION},
    )
    return wanted.difference(spec)


def _command(bundle: Bundle, plan: Plan | None, target: Target, store: PlanStore) -> str:
    """What builds plans for the present GPU, with the settings and sizes of ``plan`` where there is one."""
    settings, sizes = BuildSettings(), ""
    if plan is not None:
        try:
            settings = replace(settings_of(plan.spec), sm=())
            sizes = size_options(asked_for(from_dict(plan.spec.profile), symbols(bundle)))
        except (ValueError, TypeError):  # SettingsError is one; the sidecar was edited
            settings, sizes = BuildSettings(), ""
    folder = None if store.folder == bundle.path / FOLDER else store.folder
    return f"{build_command(bundle, target.product.name, settings, folder, target.device)} {sizes}".rstrip()
