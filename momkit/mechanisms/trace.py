"""The affine structure of a rule, found by looking into its step; nothing needs to be declared.

A step that is affine in its state S `[K, V]` is S' = L(S) + W, o = P(S) + c. A family is told by the form of L: what it
forgets, a diagonal, and what it erases, a matrix of rank one.
"""

from typing import Literal

import torch
from torch import Tensor

from momkit.kernels.generated.graph import Graph, UnsupportedStep
from momkit.kernels.generated.traced import step_graphs
from momkit.mechanisms.base import Inputs, Mechanism, Structure
from momkit.mechanisms.step_program import ROUNDING, plain_program, sampled, step_of

# sizes that differ, and keys enough to tell a diagonal from a matrix of rank one
PROBE = {"T": 1, "G": 1, "H": 1, "K": 4, "V": 3}

Erase = tuple[Literal["none", "delta", "low_rank"], Literal["decayed", "previous"]]


def is_affine(graph: Graph) -> bool:
    """Whether all results are affine in the states, whatever the inputs."""
    degree: dict[int | None, int] = {None: 0}
    for number in graph.needed():
        node = graph.nodes[number]
        degrees = [degree[operand.value] for operand in node.operands]
        if node.op == "input":
            degree[number] = int(node.name.startswith("state "))
        elif node.op in ("add", "sub", "neg", "sum") or max(degrees, default=0) == 0:
            degree[number] = max(degrees, default=0)
        elif node.op == "mul" or (node.op in ("div", "where") and degrees[1 if node.op == "div" else 0] == 0):
            degree[number] = sum(degrees) if node.op == "mul" else max(degrees)
        else:
            degree[number] = 2
    return all(degree[result.operand.value] <= 1 for result in graph.results)


def infer_structure(mechanism: Mechanism) -> Structure | None:
    """The affine structure that a rule's step has, whatever the rule declares; None if it is of no family.

    The step's graph must be affine in one state S `[H, K, V]` and leave heads apart; what L, W and P then are is read
    off the step in float64, for several draws of the inputs.
    """
    if mechanism.state_axes() != {"S": "H K V"} or mechanism.output_axes != "H V":
        return None
    two = plain_program(mechanism, PROBE | {"H": 2})
    try:
        graph, _ = step_graphs(step_of(mechanism, two), two)
    except UnsupportedStep:
        return None
    if not is_affine(graph) or graph.why_not_separable("H"):
        return None
    probes = [(Probe.of(mechanism, seed), Probe.of(mechanism, seed + 100, constants=seed)) for seed in range(3)]
    found = {probe.structure(again) for probe, again in probes}
    return found.pop() if len(found) == 1 else None


class Probe:
    """L `[K, V, K, V]`, W `[K, V]`, P `[V, K, V]`, c `[V]` of a rule at one draw of its inputs."""

    def __init__(self, mechanism: Mechanism, inputs: Inputs) -> None:
        K, V = PROBE["K"], PROBE["V"]
        self.mechanism, self.inputs = mechanism, inputs
        # the zero state, then one for each element
        states = torch.cat([torch.zeros(1, K, V), torch.eye(K * V).view(-1, K, V)]).double()
        steps = [mechanism.step({"S": S[None]}, inputs) for S in states]
        news, reads = torch.stack([new["S"][0] for new, _ in steps]), torch.stack([o[0] for _, o in steps])
        self.W, self.c = news[0], reads[0]
        self.L = (news[1:] - self.W).permute(1, 2, 0).view(K, V, K, V)
        self.P = (reads[1:] - self.c).T.view(V, K, V)

    @staticmethod
    def of(mechanism: Mechanism, seed: int, constants: int | None = None) -> "Probe":
        """A probe at random inputs; constants: another seed for those that are the same for all tokens."""
        program = plain_program(mechanism, PROBE)
        drawn, kept = (
            sampled(mechanism, program, PROBE, s)[1] for s in (seed, seed if constants is None else constants)
        )
        inputs = zip(program.inputs, drawn, kept, strict=True)
        return Probe(mechanism, {x.name: token if x.has_time else constant for x, token, constant in inputs})

    def structure(self, again: "Probe") -> Structure | None:
        """again: a probe at other tokens with the same constants."""
        K, V = PROBE["K"], PROBE["V"]
        eye = torch.eye(V).double()
        by_value = torch.einsum("kkv->v", torch.einsum("kvjv->kjv", self.L)) / K
        if same(self.L, torch.einsum("ij,uv,v->iujv", torch.eye(K).double(), eye, by_value)) and not flat(by_value):
            return self.with_read("value", ("none", "decayed"))
        A = self.L[:, 0, :, 0]
        if not same(self.L, torch.einsum("ij,uv->iujv", A, eye)) or rank(self.W) > 1:
            return None
        kept, kept_again = (diagonal_of(probe.L[:, 0, :, 0]) for probe in (self, again))
        if kept is None or kept_again is None:
            return None
        decay: Literal["none", "constant", "head", "key"] = "key"
        if flat(kept):
            decay = "none" if same(kept, torch.ones_like(kept)) else "constant" if same(kept, kept_again) else "head"
        return self.with_read(decay, self.erase(A - torch.diag(kept), kept))

    def erase(self, erased: Tensor, kept: Tensor) -> Erase:
        """What kind of matrix of rank one a step erases with; the delta rule's is -beta k (Diag(kept) k)^T."""
        if same(erased, torch.zeros_like(erased)):
            return "none", "decayed"
        v, k = self.inputs[self.mechanism.value_input][0], torch.linalg.svd(self.W).U[:, 0]
        # with its sign and length, where the rule names it
        k = k * (k @ self.inputs["k"][0]) if "k" in self.inputs else k
        strength = (k @ self.W @ v) / ((k @ k) * (v @ v))
        if same(erased, -strength * torch.outer(k, kept * k)):
            return "delta", "decayed"
        if same(erased, -strength * torch.outer(k, k)):
            return "delta", "previous"
        a = self.inputs.get("a", kept)[0]
        decayed = "a" in self.inputs and rank(torch.stack([erased.T @ erased.sum(1), kept * a])) == 1
        return "low_rank", "decayed" if decayed and not flat(kept) else "previous"

    def with_read(self, decay: Literal["none", "constant", "head", "key", "value"], erase: Erase) -> Structure | None:
        """The structure with how the step reads: q^T S' for some q, or q^T S and something along the value."""
        V = PROBE["V"]
        q = torch.linalg.lstsq(self.L.flatten(1).T, self.P.flatten()[:, None]).solution[:, 0]
        if same(torch.einsum("i,iujv->ujv", q, self.L), self.P) and same(q @ self.W, self.c):
            return Structure(decay, *erase)
        q = torch.einsum("vkv->k", self.P) / V
        along_value = rank(torch.cat([self.W, self.c[None]])) == 1
        if same(torch.einsum("k,uv->ukv", q, torch.eye(V).double()), self.P) and along_value:
            return Structure(decay, *erase, read="before")
        return None


def diagonal_of(A: Tensor) -> Tensor | None:
    """The diagonal D of D + b a^T, without what the second adds to it; None if A is no such sum."""
    K = len(A)
    off = A - torch.diag(A.diagonal())
    if same(off, torch.zeros_like(off)):
        return A.diagonal()
    found = []
    for i in range(K):
        others = [(j, k) for j in range(K) for k in range(K) if len({i, j, k}) == 3]
        # (b_i a_j) (b_k a_i) / (b_k a_j) = b_i a_i, whichever j and k
        ratios = torch.stack([A[i, j] * A[k, i] / A[k, j] for j, k in others])
        if not ratios.isfinite().all() or not flat(ratios):
            return None
        found.append(A[i, i] - ratios[0])
    return torch.stack(found)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


def flat(x: Tensor) -> bool:
    """Whether all elements are the same."""
    return same(x, x[:1].expand_as(x))


def rank(x: Tensor) -> int:
    return int(torch.linalg.matrix_rank(x, atol=ROUNDING))
