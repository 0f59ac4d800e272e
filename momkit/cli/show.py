"""`momkit show`: everything about one rule, router, task or block's spec file."""

import math
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from momkit.mechanisms.generated_scan import kernel_source
from momkit.mechanisms.triton_scan import family_of
from momkit.registry import registry
from momkit.scan import as_mechanism, choose_backend
from momkit.spec import MoMSpec

if TYPE_CHECKING:
    from momkit.mechanisms.structure_infer import Finding

# what the heads of a kernel are sized for where only a name is given
KERNEL_WIDTH = 256


def show(
    what: Annotated[str, typer.Argument(metavar="NAME|SPEC.yaml", help="A registered name, or a block's spec file.")],
    kind: Annotated[
        Literal["mechanism", "router", "task"] | None, typer.Option(help="Which one, if two share the name.")
    ] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Print the Triton source that is generated from the rule's step.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show a rule (equation, inputs, states, backend), a router, a task, or what the block of a spec file costs."""
    is_file = Path(what).suffix in (".yaml", ".yml", ".json") or "/" in what
    if kernel:
        spec = block_spec(Path(what)) if is_file else MoMSpec(hidden_size=KERNEL_WIDTH, mechanism=rule_name(what, kind))
        print_kernel(kernel_source(as_mechanism(spec.mechanism), spec.mechanism.sizes(spec.hidden_size)), as_json)
        return
    document = spec_document(Path(what)) if is_file else name_document(what, find_kind(what, kind))
    if as_json:
        emit(document)
    elif is_file:
        print_spec(document)
    else:
        print_name(document)


def print_kernel(source: str, as_json: bool) -> None:
    """The source as it is, so that it can be kept in a file."""
    if as_json:
        emit({"kernel": source})
    else:
        typer.echo(source, nl=False)


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


def rule_name(name: str, kind: str | None) -> str:
    """A name that must be a rule's."""
    if (found := find_kind(name, kind)) != "mechanism":
        raise InputError(f"{name!r} is a {found}; allowed with --kernel: a rule, or a block's spec file")
    return name


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
    """Inputs, states, structure of a rule, what its step says of it, and the backend that is best here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    structure = rule.structures()[0] if len(rule.structures()) == 1 else None
    return {
        "inputs": {name: domain_facts(domain) for name, domain in rule.inputs_domain().items()},
        "state": {name: axes.split() for name, axes in rule.state_axes().items()},
        "output": ["T", *rule.output_axes.split()],
        "structure": None if structure is None else asdict(structure),
        "step": step_facts(rule),
        "backend": asdict(choose_backend(rule, device=device)),
    }


def step_facts(rule: Mechanism) -> dict[str, Any]:
    """What is found in a rule's step, beside what the rule declares."""
    # what traces a step takes long to import, and other commands do without
    from momkit.mechanisms.structure_infer import look

    finding = look(rule)
    found = finding.structure
    return {
        "affine": finding.affine,
        "structure": None if found is None else asdict(found),
        "family": None if found is None else family_of(found),
        "verdict": verdict(rule, finding),
    }


def verdict(rule: Mechanism, finding: "Finding") -> str:
    """How what a rule declares and what is found in its step go together, and what the rule could gain."""
    found, declared = finding.structure, rule.structures()
    if rule.has_scan_kernel:
        return f"{finding}; the rule has a kernel of its own"
    if declared and type(rule).compose is not Mechanism.compose and declared != (found,):
        return f"{finding}; the rule composes it of {len(declared)} affine scans"
    if declared and declared != (found,):
        return f"{finding}; yet the rule declares {declared[0]}"
    if found is None:
        return f"{finding}; the step itself runs, on a GPU as a kernel made from it (--kernel prints it)"
    family = family_of(found)
    served = f"the {family} kernels serve it" if family else "no kernel family serves it"
    if declared:
        how = "found in its step" if rule.structure == "infer" else "declared, and found in its step"
        return f"{finding}, {how}; {served}"
    if finding.fault is None:
        return f'{finding}, not declared; structure = "infer" in the class brings the chunked form, and {served}'
    return f"{finding}, not declared; with a lower(inputs) that gives its terms, {served}: {finding.fault}"


def domain_facts(domain: Domain) -> dict[str, Any]:
    """Axes and range of an input; None is no bound, which JSON has no number for."""
    low, high = (bound if math.isfinite(bound) else None for bound in (domain.low, domain.high))
    return {"axes": domain.axes.split(), "low": low, "high": high, "unit_norm": domain.unit_norm}


def block_spec(path: Path) -> MoMSpec:
    """The spec of a block in a file."""
    spec = read_spec(path)
    if not isinstance(spec, MoMSpec):
        raise InputError(f"{path} is a {type(spec).__name__}; show takes the spec of a block")
    return spec


def spec_document(path: Path) -> dict[str, Any]:
    """What the block of a spec file is made of, and what it costs."""
    spec = block_spec(path)
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
