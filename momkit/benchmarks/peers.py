"""Other libraries' kernels and layers behind signatures of ours, so that they can be measured beside ours."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from momkit.benchmarks.cases import Scan
from momkit.errors import InputError
from momkit.mechanisms.base import Inputs
from momkit.mechanisms.gated_deltanet import GatedDeltaNetSpec
from momkit.routing.softmax_topk import SoftmaxTopKSpec
from momkit.scan import as_mechanism
from momkit.spec import MoMSpec


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
    return load(peer, PEERS[peer][rule])


def load(peer: str, op: PeerOp) -> Callable[..., Any]:
    """A function or class of a peer; InputError when it can't be loaded."""
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


# x [B, T, D] -> output [B, T, D], load-balance loss or None
LayerCall = Callable[[Tensor], tuple[Tensor, Tensor | None]]

PEER_LAYERS: dict[str, dict[str, PeerOp]] = {
    "fla": {
        "mom": PeerOp("fla.layers", "MomAttention"),
        "gated_deltanet": PeerOp("fla.layers", "GatedDeltaNet"),
    }
}


def peer_layer(peer: str, name: str, spec: MoMSpec) -> nn.Module:
    """The peer's layer of the sizes of `spec`, whose rule must be gated_deltanet: bfloat16, gate parameters float32.

    name: "mom" for its Mixture-of-Memories, "gated_deltanet" for the rule alone, with one memory.
    """
    heads = cast(GatedDeltaNetSpec, spec.mechanism)
    fields: dict[str, Any] = {"hidden_size": spec.hidden_size, "num_heads": heads.num_heads, "head_dim": heads.head_dim}
    fields |= {"expand_v": 1, "conv_size": spec.conv_size, "norm_eps": spec.norm_eps, "layer_idx": 0}
    if name == "mom":
        router = cast(SoftmaxTopKSpec, spec.router)
        fields |= {"num_memories": spec.num_memories, "topk": router.top_k, "shared_mem": spec.shared_memory}
    layer: nn.Module = load(peer, PEER_LAYERS[peer][name])(**fields)
    layer = layer.to(torch.bfloat16)
    for parameter in (layer.A_log, layer.dt_bias):
        parameter.data = cast(Tensor, parameter.data).float()
    return layer


def peer_layer_call(peer: str, layer: nn.Module) -> LayerCall:
    """Forward of a peer's layer, with the peer's own load-balance loss where it routes."""

    def call(x: Tensor) -> tuple[Tensor, Tensor | None]:
        output, _, _, *router_logits = layer(x)
        if not router_logits:
            return output, None
        return output, balance(tuple(router_logits), layer.num_memories, layer.topk)

    balance = load(peer, PeerOp("fla.models.mom.modeling_mom", "load_balancing_loss_func"))
    return call


def peer_step(peer: str, layer: nn.Module, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """One decoding step of a peer's layer, `[B, D]` to `[B, D]`, after a prompt `[B, T, D]`."""
    cache = load(peer, PeerOp("fla.models.utils", "Cache"))()
    layer = layer.eval()
    with torch.no_grad():
        layer(prompt, past_key_values=cache, use_cache=True)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = layer(x[:, None], past_key_values=cache, use_cache=True)[0]
        return output[:, 0]

    return step
