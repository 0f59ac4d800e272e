"""What a rule's step says about its structure, for rules that declare `structure = "infer"` and for those who ask."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch

from momkit.errors import InputError
from momkit.kernels.generated.graph import UnsupportedStep
from momkit.kernels.generated.traced import step_graphs
from momkit.mechanisms.base import Mechanism, MechanismSpec, Structure
from momkit.mechanisms.chunked import affine_scan
from momkit.mechanisms.reference import scan_reference
from momkit.mechanisms.step_program import ROUNDING, plain_program, step_of
from momkit.mechanisms.trace import infer_structure, is_affine

# tokens enough for what one leaves to reach the next ones, two heads that share a key head, sizes that differ
SAMPLE = {"T": 4, "G": 1, "H": 2, "K": 4, "V": 3}
OTHER = "but of no family: one state S [H, K, V], decayed, erased by one term of rank one, and k v^T added"


@dataclass(frozen=True)
class Finding:
    """What there is in a step.

    affine: in its states, whatever the inputs; None if the step can't be traced, `fault` says why.
    structure: of an affine step that is of a family; then `fault` says why `lower` does not give its terms, if so.
    """

    affine: bool | None
    structure: Structure | None = None
    fault: str | None = None

    def __str__(self) -> str:
        if self.affine is None:
            return f"of unknown form ({self.fault})"
        if not self.affine:
            return "not affine in its states"
        return f"affine in its states, {OTHER if self.structure is None else in_code(self.structure)}"


def in_code(structure: Structure) -> str:
    """A structure as one writes it, without what is left to its default."""
    given = [(f.name, getattr(structure, f.name)) for f in fields(structure) if getattr(structure, f.name) != f.default]
    return f"Structure({', '.join(f'{name}={value!r}' for name, value in given)})"


def look(rule: Mechanism) -> Finding:
    """Look into a rule's step, whatever the rule declares."""
    # in a thread of its own: autocast, inference mode, fake tensors and a default device stay with the caller
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(finding_of, rule).result()


def finding_of(rule: Mechanism) -> Finding:
    program = plain_program(rule, rule.spec.sizes(SAMPLE["H"] * SAMPLE["K"]))
    try:
        graph, _ = step_graphs(step_of(rule, program), program)
    except UnsupportedStep as error:
        return Finding(None, fault=error.args[0])
    if not is_affine(graph):
        return Finding(False)
    structure = infer_structure(rule) if set(program.sizes) <= set(SAMPLE) else None
    return Finding(True, structure, None if structure is None else why_not_lowered(rule, structure))


def why_not_lowered(rule: Mechanism, structure: Structure) -> str | None:
    """Why an affine scan of what `lower` gives is not the rule, None if it is, by example and in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = rule.sample(generator, SAMPLE)
    S = torch.randn(1, SAMPLE["H"], SAMPLE["K"], SAMPLE["V"], generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, SAMPLE["T"]])
    output, final = scan_reference(rule, inputs, cu_seqlens, {"S": S}, SAMPLE)
    try:
        lowered = affine_scan(structure, rule.lower(inputs), cu_seqlens, S)
    except (InputError, KeyError) as error:
        return str(error) if isinstance(error, InputError) else f"lower(inputs) asks for an input {error}"
    same = (
        torch.allclose(x, y, rtol=ROUNDING, atol=ROUNDING) for x, y in zip((output, final["S"]), lowered, strict=True)
    )
    return None if all(same) else "a scan of what lower(inputs) gives is not what the step does"


# what a structure depends on, by contract: a rule's class, its spec's class and text
found: dict[tuple[Any, ...], Structure] = {}


def inferred_structure(cls: type[Mechanism], spec: MechanismSpec) -> Structure:
    """The structure of a rule, looked for once; to a compiler a constant.

    Raises InputError, which says what to declare, where the step has none or `lower` does not give its terms.
    """
    request = cls, type(spec), spec.model_dump_json()
    if request not in found:
        found[request] = found_or_refused(cls(spec))
    return found[request]


torch.compiler.assume_constant_result(inferred_structure)


def found_or_refused(rule: Mechanism) -> Structure:
    """The structure on which a rule's step and its `lower` agree."""
    finding = look(rule)
    if finding.structure is None:
        allowed = "the Structure it has, or None, with which the step itself runs"
        raise InputError(f"{rule.name}: structure = 'infer', but the step is {finding}; allowed: {allowed}")
    if finding.fault is not None:
        allowed = "a lower(inputs) that gives its terms as Affine, or structure = None, with which the step itself runs"
        raise InputError(
            f"{rule.name}: structure = 'infer'; the step is {finding}, but {finding.fault}; allowed: {allowed}"
        )
    return finding.structure
