"""From what a user names to what is checked: a registered name, a spec or a class becomes subjects."""

import re
from typing import cast

import torch
import yaml
from pydantic import BaseModel

from momkit.errors import BackendError, InputError, UnknownNameError
from momkit.mechanisms.base import Mechanism, MechanismSpec
from momkit.registry import find_mechanism, find_router, registry
from momkit.routing.base import Router, RouterSpec
from momkit.scan import BACKENDS, Backend, choose_backend
from momkit.testing.decode_checks import decode_subjects
from momkit.testing.devices import CPU, current_device
from momkit.testing.subjects import BlockSubject, DispatchSubject, RouterSubject, RuleSubject, ScanSubject, Subject

Target = str | MechanismSpec | RouterSpec | type[Mechanism] | type[Router]


def backends_for(rule: Mechanism, device: torch.device = CPU) -> list[Backend]:
    """Every backend that can run a rule on a device."""
    able: list[Backend] = []
    for backend in cast(dict[Backend, object], BACKENDS):
        try:
            choose_backend(rule, backend, device=device)
        except BackendError:
            continue
        able.append(backend)
    return able


def name_with_options(name: str, spec: BaseModel) -> str:
    """The name, with the fields of the spec that differ from their defaults: `gla(num_heads=3)`."""
    fields = type(spec).model_fields
    changed = [f"{field}={value}" for field, value in spec if field != "kind" and value != fields[field].default]
    return f"{name}({','.join(changed)})" if changed else name


def subjects_of_rule(
    cls: type[Mechanism], spec: MechanismSpec, backend: Backend | None, device: torch.device
) -> list[Subject]:
    """A rule, its scan and its decoding on every backend (or one) on a device, and a block around it."""
    name = name_with_options(cls.name, spec)
    rule = RuleSubject(name, cls, spec)
    able = backends_for(rule.rule, device)
    if backend is not None:
        choose_backend(rule.rule, backend, device=device)
        able = [backend]
    scans = [ScanSubject(name, cls, spec, b, device) for b in able]
    decodes = [d for d in decode_subjects(name, cls, spec, device) if backend in (None, d.backend)]
    return [rule, *scans, *decodes, BlockSubject(name, rule)]


def subjects_of_router(cls: type[Router], spec: RouterSpec) -> list[Subject]:
    """A router, and a block around it."""
    router = RouterSubject(name_with_options(cls.name, spec), cls, spec)
    return [router, BlockSubject(router.name, router)]


def subjects_of(target: Target, backend: Backend | None = None, device: torch.device | None = None) -> list[Subject]:
    """Everything to check for a registered name, a spec or a class, which need not be registered.

    device: where scans are checked; None is the one that MOMKIT_DEVICE names.
    """
    device = current_device() if device is None else device
    if isinstance(target, str):
        return subjects_of_name(target, backend, device)
    if isinstance(target, type) and issubclass(target, Mechanism):
        return subjects_of_rule(target, target.Spec(), backend, device)
    if isinstance(target, type) and issubclass(target, Router):
        return subjects_of_router(target, target.Spec())
    if isinstance(target, MechanismSpec):
        return subjects_of_rule(find_mechanism(target.kind), target, backend, device)
    if isinstance(target, RouterSpec):
        return subjects_of_router(find_router(target.kind), target)
    raise InputError(f"{target!r} can't be checked; allowed: a registered name, a spec, a Mechanism or Router class")


def subjects_of_name(name: str, backend: Backend | None, device: torch.device) -> list[Subject]:
    """The rule of a name, and the router of that name, or the dispatch; options may follow: `gla(num_heads=3)`."""
    parts = re.fullmatch(r"(\w+)(?:\((.*)\))?", name)
    options = [] if parts is None or not parts[2] else parts[2].split(",")
    if parts is None or not all("=" in option for option in options):
        raise InputError(f"{name!r} can't be checked; allowed: a name, or NAME(field=value, ...)")
    bare = parts[1]
    fields = {field.strip(): yaml.safe_load(value) for field, _, value in (o.partition("=") for o in options)}
    found: list[list[Subject]] = [[DispatchSubject()]] if bare == DispatchSubject().name else []
    if bare in registry().names("mechanism"):
        rule = find_mechanism(bare)
        found.append(subjects_of_rule(rule, rule.Spec.model_validate(fields), backend, device))
    if bare in registry().names("router"):
        router = find_router(bare)
        found.append(subjects_of_router(router, router.Spec.model_validate(fields)))
    if not found:
        known = ", ".join([*registry().names("mechanism"), *registry().names("router"), DispatchSubject().name])
        raise UnknownNameError(f"nothing to check is registered as {name!r}; known: {known}")
    return [subject for subjects in found for subject in subjects]
