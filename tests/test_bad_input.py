"""Wrong input is refused by name: one line of the table is one mistake and the words the error must hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

import momkit
from momkit import MoMSpec, scan
from momkit.errors import BackendError, InputError, UnknownNameError
from momkit.mechanisms.base import Context, Projection
from momkit.registry import find_mechanism, temporarily
from momkit.routing.base import RouterContext
from momkit.routing.softmax_topk import SoftmaxTopK, SoftmaxTopKSpec

T, H, K, V = 6, 2, 4, 3


def inputs(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    base = {
        "q": torch.randn(T, H, K, generator=g),
        "k": torch.nn.functional.normalize(torch.randn(T, H, K, generator=g), dim=-1),
        "v": torch.randn(T, H, V, generator=g),
        "g": -torch.rand(T, H, generator=g),
        "beta": torch.rand(T, H, generator=g),
    }
    return {name: value for name, value in (base | changes).items() if value is not None}


def cu(*bounds: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(bounds, dtype=dtype)


def state(n: int = 1, k: int = K) -> dict[str, torch.Tensor]:
    return {"S": torch.zeros(n, H, k, V)}


def gated(**kwargs: Any) -> Callable[[], Any]:
    return lambda: scan("gated_deltanet", kwargs.pop("inputs", inputs()), **kwargs)


SCAN_CASES = {
    "unknown mechanism": (lambda: scan("gated_deltanets", inputs()), UnknownNameError, "gated_deltanet (momkit)"),
    "inputs no dict": (lambda: scan("gla", 5), InputError, "inputs must be a dict"),
    "state no dict": (gated(initial_state=5), InputError, "initial_state must be a dict"),
    "slots of another spec": (
        lambda: scan(find_mechanism("gsa").Spec(num_slots=K + 1), sample("gsa")),
        InputError,
        "num_slots = 5",
    ),
    "mechanism of a wrong type": (lambda: scan(3, inputs()), InputError, "mechanism"),
    "input missing": (gated(inputs=inputs(g=None)), InputError, "g missing"),
    "input unknown": (gated(inputs=inputs(gk=torch.zeros(T, H, K))), InputError, "gk unknown"),
    "input no tensor": (gated(inputs=inputs(g=[0.0])), InputError, "g must be a tensor"),
    "value no tensor": (gated(inputs=inputs(v=[0.0])), InputError, "v must be a tensor"),
    "input of integers": (
        gated(inputs=inputs(q=torch.zeros(T, H, K, dtype=torch.int64))),
        InputError,
        "q is torch.int64",
    ),
    "input on another device": (
        gated(inputs=inputs(q=torch.zeros(T, H, K, device="meta"))),
        InputError,
        "q is on meta",
    ),
    "input with too few axes": (gated(inputs=inputs(q=torch.zeros(T, K))), InputError, "q has shape"),
    "batch axis on an input": (gated(inputs=inputs(q=torch.zeros(1, T, H, K))), InputError, "q has shape"),
    "lengths differ": (gated(inputs=inputs(v=torch.zeros(T + 1, H, V))), InputError, "v has T"),
    "key dims differ": (gated(inputs=inputs(k=torch.zeros(T, H, K + 1))), InputError, "k has K"),
    "heads differ": (gated(inputs=inputs(beta=torch.zeros(T, H + 1))), InputError, "beta has H"),
    "heads no multiple of key heads": (
        gated(inputs=inputs(q=torch.zeros(T, 3, K), k=torch.zeros(T, 3, K))),
        InputError,
        "multiple of the number of key heads",
    ),
    "key dim zero": (gated(inputs=inputs(q=torch.zeros(T, H, 0), k=torch.zeros(T, H, 0))), InputError, "K = 0"),
    "spec with another head_dim": (
        lambda: scan(MoMSpec(hidden_size=8, mechanism={"kind": "gated_deltanet", "head_dim": 8}).mechanism, inputs()),
        InputError,
        "head_dim = 8",
    ),
    "module of other sizes": (
        lambda: scan(MoMSpec(hidden_size=32).build().mechanism, inputs()),
        InputError,
        "in the module",
    ),
    "cu_seqlens no tensor": (gated(cu_seqlens=[0, T]), InputError, "cu_seqlens must be a tensor"),
    "cu_seqlens of floats": (gated(cu_seqlens=torch.tensor([0.0, T])), InputError, "cu_seqlens is torch.float32"),
    "cu_seqlens of int16": (gated(cu_seqlens=cu(0, T, dtype=torch.int16)), InputError, "cu_seqlens is torch.int16"),
    "cu_seqlens with two axes": (gated(cu_seqlens=cu(0, T)[None]), InputError, "cu_seqlens has shape"),
    "cu_seqlens empty": (gated(cu_seqlens=cu()), InputError, "cu_seqlens has shape"),
    "cu_seqlens not from zero": (gated(cu_seqlens=cu(1, T)), InputError, "cu_seqlens starts at 1"),
    "cu_seqlens decreasing": (gated(cu_seqlens=cu(0, 4, 2, T)), InputError, "cu_seqlens decreases"),
    "cu_seqlens too short": (gated(cu_seqlens=cu(0, T - 1)), InputError, "cu_seqlens ends at 5"),
    "cu_seqlens too long": (gated(cu_seqlens=cu(0, T + 1)), InputError, "cu_seqlens ends at 7"),
    "cu_seqlens on another device": (gated(cu_seqlens=cu(0, T).to("meta")), InputError, "cu_seqlens is on meta"),
    "state of an unknown name": (gated(initial_state={"M": torch.zeros(1)}), InputError, "initial_state has ['M']"),
    "state with too few rows": (
        gated(initial_state=state(), cu_seqlens=cu(0, 2, T)),
        InputError,
        "has 1 rows; allowed: N = 2",
    ),
    "state of a wrong shape": (gated(initial_state=state(k=K + 1)), InputError, "initial_state['S'] has shape"),
    "state of integers": (
        gated(initial_state={"S": torch.zeros(1, H, K, V, dtype=torch.int32)}),
        InputError,
        "floating point",
    ),
    "state on another device": (gated(initial_state={"S": state()["S"].to("meta")}), InputError, "is on meta"),
    "state_index without a state": (gated(state_index=cu(0)), InputError, "state_index needs"),
    "state_index of floats": (
        gated(initial_state=state(3), state_index=torch.zeros(1)),
        InputError,
        "state_index must be",
    ),
    "state_index of a wrong length": (
        gated(initial_state=state(3), state_index=cu(0, 1)),
        InputError,
        "state_index has shape",
    ),
    "state_index out of range": (gated(initial_state=state(3), state_index=cu(3)), InputError, "allowed: 0 to 2"),
    "state_index negative": (gated(initial_state=state(3), state_index=cu(-1)), InputError, "allowed: 0 to 2"),
    "unknown backend": (gated(backend="cuda"), BackendError, "backend = 'cuda'"),
    "chunked form of a rule without one": (
        lambda: scan("ttt_linear", {n: x.float() for n, x in sample("ttt_linear").items()}, backend="chunked"),
        BackendError,
        "no affine structure",
    ),
}


def sample(name: str) -> dict[str, torch.Tensor]:
    from momkit.scan import as_mechanism

    return as_mechanism(name).sample(
        torch.Generator().manual_seed(0), {"T": T, "H": H, "G": H, "K": K, "V": K, "slots": K}
    )


@pytest.mark.parametrize("case", SCAN_CASES, ids=lambda c: c.replace(" ", "-"))
def test_scan_refuses(case: str):
    call, error, words = SCAN_CASES[case]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def spec(**fields: Any) -> Callable[[], MoMSpec]:
    return lambda: MoMSpec(**({"hidden_size": 16} | fields))


SPEC_CASES = {
    "unknown field": (spec(num_memorys=4), "num_memorys"),
    "hidden_size missing": (lambda: MoMSpec(), "hidden_size"),
    "hidden_size zero": (spec(hidden_size=0), "hidden_size"),
    "num_memories zero": (spec(num_memories=0), "num_memories"),
    "num_memories a fraction": (spec(num_memories=1.5), "num_memories"),
    "top_k beyond num_memories": (spec(router={"kind": "softmax_topk", "top_k": 5}), "router.top_k = 5"),
    "default top_k beyond one memory": (spec(num_memories=1), "router.top_k = 2"),
    "top_k zero": (spec(router={"kind": "softmax_topk", "top_k": 0}), "top_k"),
    "conv_size zero": (spec(conv_size=0), "conv_size"),
    "norm_eps zero": (spec(norm_eps=0.0), "norm_eps"),
    "norm_eps nan": (spec(norm_eps=float("nan")), "norm_eps"),
    "unknown mechanism": (spec(mechanism="mamba3"), "mamba3"),
    "mechanism without kind": (spec(mechanism={"num_heads": 2}), "kind"),
    "mechanism field unknown": (spec(mechanism={"kind": "gla", "heads": 2}), "heads"),
    "mechanism head_dim negative": (spec(mechanism={"kind": "gla", "head_dim": -1}), "head_dim"),
    "mechanism of a wrong type": (spec(mechanism=3), "mechanism"),
    "unknown router": (spec(router="topk"), "topk"),
    "schema version": (spec(schema_version=2), "schema_version"),
}


@pytest.mark.parametrize("case", SPEC_CASES, ids=lambda c: c.replace(" ", "-"))
def test_spec_refuses(case: str):
    call, words = SPEC_CASES[case]
    with pytest.raises(ValidationError) as caught:
        call()
    assert words in str(caught.value)


def block(**kwargs: Any) -> Any:
    return lambda: MoMSpec(hidden_size=16).build()(**({"x": torch.zeros(2, 5, 16)} | kwargs))


def step(x: torch.Tensor, **changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        mom = MoMSpec(hidden_size=16).build()
        return mom.step(x, replace(mom.initial_state(2), **changes))

    return call


def foreign_state() -> Any:
    return MoMSpec(hidden_size=16, num_memories=3).build().initial_state(2)


def integer_state() -> Any:
    mom = MoMSpec(hidden_size=16).build()
    state = mom.initial_state(2)
    return mom(torch.zeros(2, 5, 16), replace(state, recurrent={"S": state.recurrent["S"].long()}))


def routed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
    """A block whose router gets its memory ids wrong."""

    class WrongSpec(SoftmaxTopKSpec):
        kind: Literal["wrong"] = "wrong"  # type: ignore[assignment]

    class Wrong(SoftmaxTopK):
        Spec = WrongSpec

        def route(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
            routing = super().route(x, mask)
            return replace(routing, memory_ids=change(routing.memory_ids))

    def call() -> Any:
        with temporarily(Wrong):
            return MoMSpec(hidden_size=16, router="wrong").build()(torch.randn(1, 60, 16))

    return call


BLOCK_CASES = {
    "x no tensor": (block(x=[[0.0]]), "x must be a tensor"),
    "x of integers": (block(x=torch.zeros(2, 5, 16, dtype=torch.int64)), "x is torch.int64"),
    "x of another width": (block(x=torch.zeros(2, 5, 15)), "hidden_size = 16"),
    "x with one axis": (block(x=torch.zeros(16)), "x has shape"),
    "x with four axes": (block(x=torch.zeros(1, 2, 5, 16)), "x has shape"),
    "x of another dtype": (block(x=torch.zeros(2, 5, 16, dtype=torch.float64)), "x is torch.float64"),
    "x on another device": (block(x=torch.zeros(2, 5, 16, device="meta")), "x is on meta"),
    "batch with cu_seqlens": (block(cu_seqlens=cu(0, 5, 10)), "B = 2 with cu_seqlens"),
    "cu_seqlens not ending at T": (block(x=torch.zeros(10, 16), cu_seqlens=cu(0, 5)), "cu_seqlens ends at 5"),
    "mask of another shape": (block(mask=torch.ones(2, 4, dtype=torch.bool)), "mask has shape"),
    "mask of floats": (block(mask=torch.ones(2, 5)), "mask is torch.float32"),
    "mask with twos": (block(mask=torch.full((2, 5), 2)), "other than 0 and 1"),
    "mask no tensor": (block(mask=[True]), "mask must be a tensor"),
    "mask on another device": (block(mask=torch.ones(2, 5, dtype=torch.bool, device="meta")), "mask is on meta"),
    "state of another batch": (block(state=MoMSpec(hidden_size=16).build().initial_state(3)), "state.recurrent['S']"),
    "state of another block": (block(state=foreign_state()), "state.recurrent['S'] has shape"),
    "state no state": (block(state={}), "state must be a MoMState"),
    "step on a sequence": (step(torch.zeros(2, 1, 16)), "allowed: [B, D]"),
    "step with another batch": (step(torch.zeros(3, 16)), "state.recurrent['S']"),
    "step without conv history": (step(torch.zeros(2, 16), conv={}), "state.conv has []"),
    "backend that can't run the rule": (
        lambda: MoMSpec(hidden_size=16, mechanism="titans").build(backend="chunked"),
        "can't run 'titans'",
    ),
    "state of integers": (integer_state, "state.recurrent['S'] is torch.int64"),
    "state no tensors": (
        lambda: step(torch.zeros(2, 16), recurrent={"S": 0})(),
        "state.recurrent['S'] must be a tensor",
    ),
    "block from a dict": (lambda: momkit.MoMBlock({"hidden_size": 16}), "spec must be a MoMSpec"),
    "layer beyond the last": (lambda: MoMSpec(hidden_size=16).build(layer_index=2, num_layers=2), "layer_index = 2"),
    "context without layers": (lambda: Context(16, 0, 0), "num_layers = 0"),
    "projection without axes": (lambda: Projection("z", (), l2=True), "shape = ()"),
    "projection of a bad name": (lambda: Projection("a.b", (2,)), "projection 'a.b'"),
    "projection of a bad activation": (lambda: Projection("z", (2,), activation="relu"), "activation = 'relu'"),  # type: ignore[arg-type]
    "conv bias without conv": (lambda: Projection("z", (2,), conv_bias=True), "conv_bias = True needs conv"),
    "select beyond the batch": (
        lambda: MoMSpec(hidden_size=16).build().initial_state(2).select(cu(2)),
        "index holds [2]",
    ),
    "select by floats": (
        lambda: MoMSpec(hidden_size=16).build().initial_state(2).select(torch.zeros(1)),
        "index must be",
    ),
    "fraction of a batch": (lambda: MoMSpec(hidden_size=16).build().initial_state(2.5), "batch_size = 2.5"),
    "router with ids beyond the memories": (routed(lambda ids: ids + 1), "routing.memory_ids hold"),
    "router with one memory twice": (routed(lambda ids: ids * 0), "twice for one token"),
    "router with too many choices": (routed(lambda ids: torch.cat([ids, ids], 1)), "routing.memory_ids is"),
    "router with ids of int32": (routed(lambda ids: ids.int()), "routing.memory_ids is"),
    "negative batch": (lambda: MoMSpec(hidden_size=16).build().initial_state(-1), "batch_size = -1"),
}


@pytest.mark.parametrize("case", BLOCK_CASES, ids=lambda c: c.replace(" ", "-"))
def test_block_refuses(case: str):
    call, words = BLOCK_CASES[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


def test_router_refuses_too_few_memories():
    router = momkit.registry.find_router("softmax_topk")
    with pytest.raises(ValueError, match=r"router.top_k = 2 is more than num_memories = 1"):
        router(router.Spec(), RouterContext(hidden_size=4, num_memories=1))


def test_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch):
    mom = MoMSpec(hidden_size=16).build()
    x = torch.zeros(1, 3, 16)
    x[0, 1, 0] = torch.nan
    mom(x)
    monkeypatch.setenv("MOMKIT_CHECK", "1")
    with pytest.raises(InputError, match=r"x holds NaN or inf"):
        mom(x)
    mom.router.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"routing.logits holds NaN or inf"):
        mom(torch.zeros(1, 3, 16))
    with pytest.raises(InputError, match=r"initial_state\['S'\] holds NaN"):
        scan("gated_deltanet", inputs(), initial_state={"S": torch.full((1, H, K, V), torch.nan)})
    scan("gated_deltanet", inputs(g=torch.full((T, H), -torch.inf)))
    with pytest.raises(InputError, match="q holds NaN"):
        scan("gated_deltanet", inputs(q=torch.full((T, H, K), torch.nan)))


def test_empty_input_is_legal():
    out = scan("gated_deltanet", {n: x[:0] for n, x in inputs().items()}, cu(0, 0), initial_state=state())
    assert out.output.shape == (0, H, V)
    assert torch.equal(out.final_state["S"], state()["S"])
    mom = MoMSpec(hidden_size=16).build()
    before = mom(torch.randn(2, 4, 16)).state
    after = mom(torch.zeros(2, 0, 16), before)
    assert after.hidden_states.shape == (2, 0, 16)
    assert all(torch.equal(after.state.recurrent[n], before.recurrent[n]) for n in before.recurrent)
    assert all(torch.equal(after.state.conv[n], before.conv[n]) for n in before.conv)
