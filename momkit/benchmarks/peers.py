"""Other libraries' kernels behind the signature of `cases.Scan`, so that they can be measured beside ours."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from momkit.benchmarks.cases import Scan
from momkit.errors import InputError
from momkit.mechanisms.base import Inputs
from momkit.scan import as_mechanism


@dataclass(frozen=True)
class PeerOp:
    """A function of a peer, and what it calls those inputs that it names otherwise."""

    module: str
    function: str
    names: tuple[tuple[str, str], ...] = ()


PEERS: dict[str, dict[str, PeerOp]] = {
    "fla": {
        "mamba2": PeerOp("fla.ops.simple_gla", "chunk_simple_gla"),
        "gla": PeerOp("fla.ops.gla", "chunk_gla", (("gk", "g"),)),
        "deltanet": PeerOp("fla.ops.delta_rule", "chunk_delta_rule"),
        "gated_deltanet": PeerOp("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        "kda": PeerOp("fla.ops.kda", "chunk_kda", (("gk", "g"),)),
    }
}
PACKAGES = {"fla": "flash-linear-attention"}


def check_peer(peer: str) -> None:
    """InputError for a peer that nobody wrote an adapter for."""
    if peer not in PEERS:
        raise InputError(f"peer = {peer!r}; allowed: {', '.join(PEERS)}")


def peer_function(peer: str, rule: str) -> Callable[..., Any]:
    """The peer's function for a rule; InputError when there is none or it can't be loaded."""
    check_peer(peer)
    if rule not in PEERS[peer]:
        raise InputError(f"peer {peer!r} has no counterpart of {rule!r}; it has: {', '.join(PEERS[peer])}")
    op = PEERS[peer][rule]
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(op.module), op.function)
    except Exception as fault:  # whatever a peer does when it is imported, it can't be measured
        reason = f"{type(fault).__name__}: {fault}"
        raise InputError(f"peer {peer!r} can't be measured: {reason}; pip install {PACKAGES[peer]}") from fault
    return function


def peer_scan(peer: str, rule: str) -> Scan:
    """The peer's scan over packed segments; it takes a batch axis of one, and is not asked for final states, which ours
    always gives."""
    function, mechanism = peer_function(peer, rule), as_mechanism(rule)
    names = dict(PEERS[peer][rule].names)

    def call(inputs: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, None]:
        # views, whose backward passes are views too: the adapter costs neither time nor memory
        batched = {names.get(name, name): x.unsqueeze(0) for name, x in inputs.items()}
        scale = mechanism.scale_for(inputs["q"])
        output, _ = function(**batched, scale=scale, cu_seqlens=cu_seqlens)
        return output.squeeze(0), None

    return call
