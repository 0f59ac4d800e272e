"""Decoding in a pool of states: the door, every rule by its step, and the kernel, interpreted or on a GPU."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from momkit.decode import BACKENDS, choose_decode_backend, decode, run_decode
from momkit.errors import BackendError, InputError, UnknownNameError
from momkit.mechanisms.base import Affine, Domain, HeadSpec, Inputs, Mechanism, Sizes, State, Structure
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.mechanisms.rwkv6 import RWKV6Spec
from momkit.registry import find_mechanism, registry
from momkit.scan import as_mechanism, scan
from momkit.testing import decode_checks
from momkit.testing.affine import affine_step
from momkit.testing.decode_checks import DecodeSubject, decode_subjects
from momkit.testing.targets import name_with_options
from momkit.testing.tolerances import assert_close, assert_equal

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="interprets the kernel: set TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(
    INTERPRETING or not torch.cuda.is_available(), reason="needs a CUDA GPU, and no interpreter"
)

NAMES = registry().names("mechanism")
ON_KERNEL = [
    name for name in NAMES if as_mechanism(name).structure and type(as_mechanism(name)).compose is Mechanism.compose
]
CHECKS = [check for name, check in vars(decode_checks).items() if name.startswith("check_")]
SPECS = [LinearAttentionSpec(normalize=True), RWKV6Spec(scale=0.5), *(find_mechanism(name).Spec() for name in NAMES)]
B, P, H, G, K, V = 5, 7, 4, 2, 20, 24
INDEX = [3, -1, 0, 6, 2]
ROWS = [3, 0, 6, 2]


def sizes_of(rule: Mechanism, **changes: int) -> Sizes:
    """A size for whatever axes the rule has; K = V where it needs that."""
    entries = [domain.axes for domain in rule.inputs_domain().values()] + list(rule.state_axes().values())
    known = {"H": H, "G": G, "K": K, "V": K if rule.name == "ttt_linear" else V, "T": B} | changes
    return {axis: known.get(axis, 3) for axes in entries for axis in axes.split()} | {k: known[k] for k in "GHT"}


def inputs_of(rule: Mechanism, sizes: Sizes | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    """Token inputs in `dtype`, gates and other bounded inputs at least in float32."""
    sampled = rule.sample(torch.Generator().manual_seed(seed), sizes or sizes_of(rule))
    wide = dtype if dtype == torch.float64 else torch.float32
    free = {name for name, domain in rule.inputs_domain().items() if domain.low == -domain.high}
    return {name: x.to(dtype if name in free else wide) for name, x in sampled.items()}


def pool_of(rule: Mechanism, sizes: Sizes | None = None, dtype: torch.dtype = torch.float32, rows: int = P) -> State:
    generator = torch.Generator().manual_seed(1)
    shapes = rule.state_spec(sizes or sizes_of(rule))
    return {
        n: torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in shapes.items()
    }


def copy_of(pool: State) -> State:
    return {name: x.clone() for name, x in pool.items()}


def assert_decodes_as_scan(
    rule: Mechanism, inputs: Inputs, pool: State, index: list[int], backend: str, **kwargs
) -> None:
    """Outputs and states of one-token segments, padding rows zero, other pool rows as they were."""
    before, value = copy_of(pool), inputs[rule.value_input]
    place = torch.tensor(index, dtype=kwargs.get("index_dtype", torch.int64), device=value.device)
    output = decode(rule, inputs, pool, place, backend=backend)
    alive = place >= 0
    wide = {name: x.double() for name, x in inputs.items()}
    bounds = torch.arange(len(index) + 1, device=value.device)
    start = {name: x.double()[place.clamp_min(0).long()] for name, x in before.items()}
    expected = scan(rule, wide, bounds, initial_state=start, backend="reference")
    assert output.dtype == value.dtype
    assert_close(output[alive], expected.output[alive], "output", value.dtype)
    assert_equal(output[~alive], torch.zeros_like(output[~alive]), "padding rows")
    rows = place[alive].long()
    others = [row for row in range(len(before[next(iter(before))])) if row not in index]
    for name, x in pool.items():
        assert_close(x[rows], expected.final_state[name][alive].to(x.dtype), name)
        assert_equal(x[others], before[name][others], f"{name} of other rows")


# the door


def door(**changes: Any) -> Callable[[], Tensor]:
    """A call that is right but for the changes."""
    rule = as_mechanism("gated_deltanet")
    inputs = changes.pop("inputs", inputs_of(rule))
    pool = changes.pop("pool", pool_of(rule))
    index = changes.pop("state_index", torch.tensor(INDEX))
    return lambda: decode(changes.pop("mechanism", rule), inputs, pool, index, **changes)


def pool(**changes: Any) -> dict[str, Any]:
    """States of gated_deltanet, one of them replaced."""
    return pool_of(as_mechanism("gated_deltanet")) | changes


SHAPE = (P, H, K, V)
BAD_INPUT = {
    "unknown mechanism": (door(mechanism="gated"), UnknownNameError, "gated_deltanet (momkit)"),
    "inputs no dict": (door(inputs=5), InputError, "inputs must be a dict"),
    "inputs of another length": (
        door(inputs=inputs_of(as_mechanism("gated_deltanet")) | {"g": torch.zeros(B + 1, H)}),
        InputError,
        f"g has T = {B + 1}",
    ),
    "pool no dict": (door(pool=torch.zeros(SHAPE)), InputError, "pool must be a dict"),
    "state missing": (door(pool={}), InputError, "pool has []; allowed: ['S']"),
    "state unknown": (door(pool=pool(z=torch.zeros(P))), InputError, "pool has ['S', 'z']"),
    "state no tensor": (door(pool=pool(S=[0.0])), InputError, "pool['S'] must be a tensor, got list"),
    "state of the inputs' dtype": (
        door(pool=pool(S=torch.zeros(SHAPE).half())),
        InputError,
        "pool['S'] is torch.float16",
    ),
    "wide state for narrow inputs": (
        door(pool=pool(S=torch.zeros(SHAPE).double())),
        InputError,
        "pool['S'] is torch.float64; allowed for these inputs: torch.float32",
    ),
    "state of another shape": (
        door(pool=pool(S=torch.zeros(P, H, V, K))),
        InputError,
        f"pool['S'] has shape ({P}, {H}, {V}, {K}); allowed: [P, H, K, V] = [1 or more, {H}, {K}, {V}]",
    ),
    "no state": (door(pool=pool(S=torch.zeros(0, H, K, V))), InputError, "1 or more"),
    "state on another device": (
        door(pool=pool(S=torch.zeros(SHAPE, device="meta"))),
        InputError,
        "pool['S'] is on meta",
    ),
    "state that is a view": (
        door(pool=pool(S=torch.zeros(P, H, V, K).mT)),
        InputError,
        "pool['S'] has strides",
    ),
    "state that learns": (
        door(pool=pool(S=torch.zeros(SHAPE, requires_grad=True))),
        InputError,
        "pool['S'] requires a gradient",
    ),
    "pools of unequal length": (
        lambda: decode(
            LinearAttentionSpec(normalize=True),
            inputs_of(as_mechanism("linear_attention")),
            {"S": torch.zeros(P, H, K, V), "z": torch.zeros(P + 1, H, K)},
            torch.tensor(INDEX),
        ),
        InputError,
        f"pool['z'] has P = {P + 1} rows, other states have {P}",
    ),
    "index no tensor": (door(state_index=INDEX), InputError, "state_index is list"),
    "index of floats": (door(state_index=torch.tensor(INDEX).float()), InputError, "state_index is torch.float32"),
    "index too short": (door(state_index=torch.tensor(INDEX[1:])), InputError, "state_index has shape (4,)"),
    "index on another device": (door(state_index=torch.zeros(B, device="meta").long()), InputError, "on meta"),
    "index out of range": (
        door(state_index=torch.tensor([0, 1, 2, 3, P])),
        InputError,
        f"allowed: 0 to {P - 1}, and -1",
    ),
    "index below -1": (door(state_index=torch.tensor([0, 1, 2, 3, -2])), InputError, "state_index holds"),
    "a row twice": (door(state_index=torch.tensor([0, 1, -1, -1, 0])), InputError, "allowed: no pool row twice"),
    "unknown backend": (door(backend="chunked"), BackendError, "known: auto, reference, triton"),
    "float64 on the kernel": (
        door(
            inputs=inputs_of(as_mechanism("gated_deltanet"), dtype=torch.float64),
            pool=pool_of(as_mechanism("gated_deltanet"), dtype=torch.float64),
            backend="triton",
        ),
        BackendError,
        "float64" if INTERPRETING else "on CUDA, not on cpu",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case):
    call, error, words = BAD_INPUT[case]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_a_refused_call_changes_nothing():
    states = pool_of(as_mechanism("gated_deltanet"))
    before = copy_of(states)
    with pytest.raises(InputError):
        door(pool=states, state_index=torch.tensor([0, 1, 2, 3, 3]))()
    assert_equal(states["S"], before["S"], "the pool")


@pytest.mark.parametrize("name", NAMES)
def test_auto_says_what_decodes_and_why(name):
    rule, cuda = as_mechanism(name), torch.device("cuda")
    assert choose_decode_backend(rule).backend == "reference"
    choice = choose_decode_backend(rule, device=cuda)
    served = name in ON_KERNEL or rule.has_decode_kernel
    assert choice.backend == ("triton" if served else "generated")
    if not served:
        words = "composes its scans itself" if rule.structure else "no affine structure"
        assert words in choice.reason
        with pytest.raises(BackendError, match=f"'triton' can't decode '{name}': the rule .*{words}"):
            choose_decode_backend(rule, "triton", device=cuda)


def test_auto_names_what_keeps_it_from_the_kernel():
    rule, cuda = as_mechanism("gla"), torch.device("cuda")
    assert "float64" in choose_decode_backend(rule, device=cuda, dtype=torch.float64).reason
    assert "K = 257 is more than 256" in choose_decode_backend(rule, device=cuda, sizes={"K": 257, "V": 64}).reason
    assert choose_decode_backend(rule, device=cuda, sizes={"K": 256, "V": 256}).backend == "triton"


def test_the_kernel_is_imported_only_where_it_runs():
    code = "import sys, momkit.decode; sys.exit('triton' in sys.modules or 'momkit.kernels.decode' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# every rule, by its step


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: name_with_options(spec.kind, spec))
def test_conformance_of_the_step(spec, check):
    check(DecodeSubject(spec.kind, find_mechanism(spec.kind), spec, "reference"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_in_the_pool_is_a_scan_of_one_token(name, dtype):
    rule = as_mechanism(name)
    states = pool_of(rule, dtype=dtype if dtype == torch.float64 else torch.float32)
    assert_decodes_as_scan(rule, inputs_of(rule, dtype=dtype), states, INDEX, "auto", index_dtype=torch.int32)


@pytest.mark.parametrize("index", [[-1], [-1, -1], [0], [-1, 0, -1]], ids=str)
def test_a_pool_of_one_row(index):
    rule = as_mechanism("gla")
    sizes = sizes_of(rule, T=len(index))
    assert_decodes_as_scan(rule, inputs_of(rule, sizes), pool_of(rule, rows=1), index, "reference")


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_no_rows(backend):
    rule = as_mechanism("gla")
    states = pool_of(rule)
    before = copy_of(states)
    output = decode(
        rule, inputs_of(rule, sizes_of(rule, T=0)), states, torch.tensor([], dtype=torch.int64), backend=backend
    )
    assert output.shape == (0, H, V)
    assert_equal(states["S"], before["S"], "the pool")


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_an_index_may_be_a_column(backend):
    rule = as_mechanism("gla")
    inputs, plain, other = inputs_of(rule), pool_of(rule), pool_of(rule)
    column = torch.tensor([[row, 1] for row in INDEX])[:, 0]
    expected = decode(rule, inputs, plain, torch.tensor(INDEX), backend=backend)
    assert_equal(decode(rule, inputs, other, column, backend=backend), expected, "output")
    assert_equal(other["S"], plain["S"], "the pool")


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_constants_may_vary_by_row(backend):
    for name in ("retention", "rwkv6"):
        rule = as_mechanism(name)
        inputs, index = inputs_of(rule), torch.tensor(INDEX)
        constant = "g" if name == "retention" else "u"
        same, other = pool_of(rule), pool_of(rule)
        output = decode(rule, inputs, same, index, backend=backend)
        varying = inputs | {constant: inputs[constant].expand(B, *inputs[constant].shape)}
        assert_equal(decode(rule, varying, other, index, backend=backend), output, name)
        assert_equal(other["S"], same["S"], name)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_never_looks_at_a_value(name):
    """A fake tensor has none: looking at one, or a shape that depends on one, would raise."""
    rule = as_mechanism(name)
    with FakeTensorMode() as mode:
        inputs = {n: mode.from_tensor(x) for n, x in inputs_of(rule).items()}
        states = {n: mode.from_tensor(x) for n, x in pool_of(rule).items()}
        output = run_decode(rule, inputs, states, mode.from_tensor(torch.tensor(INDEX)), backend="reference")
    assert len(output) == B


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_gradients_and_autocast_stay_out(backend):
    rule = as_mechanism("gated_deltanet")
    inputs, plain, other = inputs_of(rule), pool_of(rule), pool_of(rule)
    expected = decode(rule, inputs, plain, torch.tensor(INDEX), backend=backend)
    learning = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = decode(rule, learning, other, torch.tensor(INDEX), backend=backend)
    assert not output.requires_grad and not other["S"].requires_grad
    assert_equal(output, expected, "output")
    assert_equal(other["S"], plain["S"], "the pool")


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_decoding_compiles_to_one_graph(backend):
    rule = as_mechanism("gated_deltanet")
    inputs, plain, other, index = inputs_of(rule), pool_of(rule), pool_of(rule), torch.tensor(INDEX)
    expected = decode(rule, inputs, plain, index, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: decode(rule, *args, backend=backend), fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs, other, index), expected, "output")
    assert_close(other["S"], plain["S"], "the pool")


# the kernel, interpreted


class AnySpec(HeadSpec):
    kind: str = "any_affine"


class AnyAffine(Mechanism):
    """A rule that is the generic affine step of some structure; `read_heads` gives q heads of its own."""

    Spec = AnySpec

    def __init__(self, structure: Structure, read_heads: str = "G") -> None:
        super().__init__(AnySpec(scale=0.7))
        self.structure, self.read_heads = structure, read_heads

    def inputs_domain(self) -> dict[str, Domain]:
        s, domain = self.structure, {"q": Domain(f"T {self.read_heads} K")}
        domain |= {"k": Domain("T G K", unit_norm=True), "v": Domain("T H V")}
        gates = {"constant": ("g", "H"), "head": ("g", "T H"), "key": ("gk", "T G K"), "value": ("gv", "T H V")}
        if s.decay != "none":
            name, axes = gates[s.decay]
            domain[name] = Domain(axes, high=0.0)
        if s.erase == "delta":
            domain["beta"] = Domain("T H", low=0.0, high=1.0)
        if s.erase == "low_rank":
            domain |= {"a": Domain("T G K", unit_norm=True), "b": Domain("T G K")}
        if s.read == "before":
            domain["u"] = Domain("H K")
        return domain

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        S, output = affine_step(self.structure, state["S"], Affine(**inputs, scale=0.7))
        return {"S": S}, output


STRUCTURES = [
    Structure(*parts)
    for parts in itertools.product(
        ("none", "constant", "head", "key", "value"),
        ("none", "delta", "low_rank"),
        ("decayed", "previous"),
        ("after", "before"),
    )
]


@interpreted
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ON_KERNEL)
def test_conformance_of_the_kernel(name, check):
    rule = find_mechanism(name)
    subjects = decode_subjects(name, rule, rule.Spec())
    assert [subject.backend for subject in subjects] == ["reference", "triton"]
    check(subjects[-1])


@interpreted
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: f"{s.decay}-{s.erase}-{s.erase_sees}-{s.read}")
def test_every_structure_decodes(structure):
    rule = AnyAffine(structure)
    assert_decodes_as_scan(rule, inputs_of(rule), pool_of(rule), INDEX, "triton")


@interpreted
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (7, 17), (16, 16), (33, 70), (100, 65), (256, 256)])
@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_any_size_decodes(name, keys, values):
    rule = as_mechanism(name)
    sizes = sizes_of(rule, K=keys, V=values)
    assert_decodes_as_scan(rule, inputs_of(rule, sizes), pool_of(rule, sizes), INDEX, "triton")


@interpreted
@pytest.mark.parametrize("busy", [0, 12, 10**6])
def test_every_tile_decodes(busy, monkeypatch):
    from momkit.kernels import decode as kernel

    monkeypatch.setattr(kernel, "multiprocessors", lambda device: busy)
    rule = as_mechanism("kda")
    sizes = sizes_of(rule, V=96)
    block, _ = kernel.tile_of(B * H, K, 96, torch.device("cpu"))
    assert block == {0: 64, 12: 32, 10**6: 16}[busy]
    assert_decodes_as_scan(rule, inputs_of(rule, sizes), pool_of(rule, sizes), INDEX, "triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ON_KERNEL)
def test_any_dtype_decodes(name, dtype):
    rule = as_mechanism(name)
    assert_decodes_as_scan(rule, inputs_of(rule, dtype=dtype), pool_of(rule), INDEX, "triton", index_dtype=torch.int32)


@interpreted
def test_a_rule_may_compute_with_narrow_gates():
    """hgrn2 makes its keys of its gates: in float32, whatever the gates come in."""
    rule = as_mechanism("hgrn2")
    inputs = {name: x.half() for name, x in inputs_of(rule).items()}
    assert_decodes_as_scan(rule, inputs, pool_of(rule), INDEX, "triton")


@interpreted
def test_parts_of_one_projection_decode():
    rule = as_mechanism("retention")
    inputs, width = inputs_of(rule), G * K
    wide = torch.cat([inputs[name].flatten(1) for name in ("q", "k", "v")], 1)
    q, k, v = wide.split([width, width, H * V], 1)
    views = inputs | {"q": q.view(B, G, K), "k": k.view(B, G, K), "v": v.view(B, H, V)}
    transposed = {"v": inputs["v"].mT.contiguous().mT}
    for given in (views, inputs | transposed):
        assert_decodes_as_scan(rule, given, pool_of(rule), INDEX, "triton")


@interpreted
def test_queries_may_have_more_heads_than_keys():
    rule = AnyAffine(Structure(decay="key", erase="delta"), read_heads="H")
    assert_decodes_as_scan(rule, inputs_of(rule), pool_of(rule), INDEX, "triton")


@interpreted
@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv6", "rwkv7"])
def test_opcheck(name):
    from momkit.kernels.decode import decode_rows

    rule, index = as_mechanism(name), torch.tensor(INDEX)
    x, structure = rule.lower(inputs_of(rule)), rule.structure
    u = None if x.u is None else x.u.expand(B, H, K)
    named = (x.q, x.k, x.v, x.g, x.gk, x.gv, x.beta, x.a, x.b, u)
    flags = (structure.erase_sees == "previous", structure.read == "before")
    torch.library.opcheck(decode_rows, (*named, pool_of(rule)["S"], index, x.scale, *flags))


# on a GPU


def on_device(tensors: Inputs) -> Inputs:
    return {name: x.cuda() for name, x in tensors.items()}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ON_KERNEL)
def test_conformance_on_a_gpu(name, check):
    rule = find_mechanism(name)
    check(DecodeSubject(name, rule, rule.Spec(), "triton", torch.device("cuda")))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "keys", "values"), [(1, 256, 256), (5, 100, 65), (512, 128, 128)])
@pytest.mark.parametrize("name", ON_KERNEL)
def test_sizes_on_a_gpu(name, rows, keys, values, dtype):
    rule = as_mechanism(name)
    sizes = sizes_of(rule, T=rows, K=keys, V=values)
    states = on_device(pool_of(rule, sizes, rows=rows + 2))
    index = [
        -1 if row % 7 == 3 else row
        for row in torch.randperm(rows + 2, generator=torch.Generator().manual_seed(0))[:rows].tolist()
    ]
    assert_decodes_as_scan(rule, on_device(inputs_of(rule, sizes, dtype=dtype)), states, index, "triton")


@pytest.mark.gpu
@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_decoding_never_synchronises(name, backend):
    rule = as_mechanism(name)
    inputs, states, index = on_device(inputs_of(rule)), on_device(pool_of(rule)), torch.tensor(INDEX).cuda()
    decode(rule, inputs, states, index, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(rule, inputs, states, index, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_serves_new_data_and_padding(backend):
    rule = as_mechanism("gated_deltanet")
    inputs, states, index = on_device(inputs_of(rule)), on_device(pool_of(rule)), torch.tensor(INDEX).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode(rule, inputs, states, index, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode(rule, inputs, states, index, backend=backend)
    for seed, rows in enumerate(([3, -1, 0, 6, 2], [-1] * B, [6, 5, 4, -1, 1], [0, 1, 2, 3, 4])):
        for name, x in inputs_of(rule, seed=seed).items():
            inputs[name].copy_(x)
        index.copy_(torch.tensor(rows))
        expected_pool = copy_of(states)
        expected = decode(rule, inputs, expected_pool, index, backend=backend)
        graph.replay()
        assert_equal(output, expected, f"output of rows {rows}")
        assert_equal(states["S"], expected_pool["S"], f"the pool after rows {rows}")


@pytest.mark.gpu
@on_gpu
# what inductor warns of is about kernels that are not ours
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiled_on_a_gpu(backend):
    rule = as_mechanism("gated_deltanet")
    inputs, index = on_device(inputs_of(rule)), torch.tensor(INDEX).cuda()
    plain, other = on_device(pool_of(rule)), on_device(pool_of(rule))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: decode(rule, *args, backend=backend), fullgraph=True)
    expected = decode(rule, inputs, plain, index, backend=backend)
    assert_close(compiled(inputs, other, index), expected, "output")
    assert_close(other["S"], plain["S"], "the pool")
