"""`momkit show`: everything about one rule, router, task or block's spec file."""

import math
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import BaseModel
from torch._subclasses.fake_tensor import FakeTensorMode

from momkit.accounting import measure
from momkit.cli.catalog import PLURALS, describe
from momkit.cli.console import JsonFlag, emit
from momkit.cli.pages import print_name, print_spec
from momkit.cli.specs import read_spec
from momkit.errors import InputError, UnknownNameError
from momkit.mechanisms.base import Domain, Mechanism
from momkit.registry import registry
from momkit.scan import as_mechanism, choose_backend
from momkit.spec import MoMSpec


def show(
    what: Annotated[str, typer.Argument(metavar="NAME|SPEC.yaml", help="A registered name, or a block's spec file.")],
    kind: Annotated[
        Literal["mechanism", "router", "task"] | None, typer.Option(help="Which one, if two share the name.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a rule (equation, inputs, states, backend), a router, a task, or what the block of a spec file costs."""
    is_file = Path(what).suffix in (".yaml", ".yml", ".json") or "/" in what
    document = spec_document(Path(what)) if is_file else name_document(what, find_kind(what, kind))
    if as_json:
        emit(document)
    elif is_file:
        print_spec(document)
    else:
        print_name(document)


def find_kind(name: str, kind: str | None) -> str:
    """What a name is registered as; an unknown name is refused with those that are near it."""
    found = registry()
    kinds = [k for k in PLURALS if name in found.classes[k] and kind in (None, k)]
    if len(kinds) > 1:
        raise InputError(f"{name!r} is a {' and a '.join(kinds)}; say which with --kind")
    if not kinds:
        known = [other for k in PLURALS if kind in (None, k) for other in found.names(k)]
        near = get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise UnknownNameError("; ".join([f"{name!r} is no {kind or 'rule, router or task'}; {hint}", *found.faults()]))
    return kinds[0]


def name_document(name: str, kind: str) -> dict[str, Any]:
    """What is known about a registered name."""
    found = registry()
    cls: Any = found.classes[kind][name]
    document = {"kind": kind, "name": name, "owner": found.owners[kind, name], **describe(cls)}
    facts = mechanism_facts(as_mechanism(name)) if kind == "mechanism" else {}
    return document | {"fields": spec_fields(cls.Spec())} | facts


def spec_fields(spec: BaseModel) -> dict[str, Any]:
    """The settings of a rule, router or task and their defaults; None is one that follows from others."""
    return {name: value for name, value in spec.model_dump(mode="json").items() if name != "kind"}


def mechanism_facts(rule: Mechanism) -> dict[str, Any]:
    """Inputs, states, structure of a rule, and the backend that runs it on the best device here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "inputs": {name: domain_facts(domain) for name, domain in rule.inputs_domain().items()},
        "state": {name: axes.split() for name, axes in rule.state_axes().items()},
        "output": ["T", *rule.output_axes.split()],
        "structure": None if rule.structure is None else asdict(rule.structure),
        "backend": asdict(choose_backend(rule, device=device)),
    }


def domain_facts(domain: Domain) -> dict[str, Any]:
    """Axes and range of an input; None is no bound, which JSON has no number for."""
    low, high = (bound if math.isfinite(bound) else None for bound in (domain.low, domain.high))
    return {"axes": domain.axes.split(), "low": low, "high": high, "unit_norm": domain.unit_norm}


def spec_document(path: Path) -> dict[str, Any]:
    """What the block of a spec file is made of, and what it costs."""
    spec = read_spec(path)
    if not isinstance(spec, MoMSpec):
        raise InputError(f"{path} is a {type(spec).__name__}; show takes the spec of a block")
    costs = measure(spec)
    with FakeTensorMode():
        block = spec.build()
        state = block.initial_state(1)
    return {
        "kind": "spec",
        "spec": spec.model_dump(mode="json"),
        "parameters": asdict(costs.parameters),
        "state_bytes": asdict(costs.state_bytes),
        "flops_per_token": costs.flops_per_token | {"total": sum(costs.flops_per_token.values())},
        "shapes": {
            "parameters": {name: list(p.shape) for name, p in block.named_parameters()},
            "recurrent": {name: list(tensor.shape[1:]) for name, tensor in state.recurrent.items()},
            "conv": {name: list(tensor.shape[1:]) for name, tensor in state.conv.items()},
        },
        "backends": {name: asdict(choice) for name, choice in block.backend_report().items()},
    }
