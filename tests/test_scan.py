"""The door to every rule: what it takes, what it gives back, which backend runs."""

import logging

import pytest
import torch

from momkit import MoMSpec, scan
from momkit.errors import BackendError
from momkit.mechanisms.base import Context, Inputs, Mechanism, Sizes, State
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.registry import find_mechanism, registry
from momkit.scan import BACKENDS, BackendChoice, as_mechanism, choose_backend, log_choice, read_sizes, run
from momkit.testing.targets import backends_for

NAMES = registry().names("mechanism")
every_rule = pytest.mark.parametrize("name", NAMES)
CU_SEQLENS = torch.tensor([0, 4, 4, 5, 12])
T, N = 12, 4


def sizes_of(rule: Mechanism) -> Sizes:
    """Small sizes for whatever axes the rule has; K = V, which some rules need."""
    entries = [domain.axes for domain in rule.inputs_domain().values()] + list(rule.state_axes().values())
    known = {"H": 2, "G": 2, "K": 4, "V": 4, "T": T}
    return {axis: known.get(axis, 3) for axes in entries for axis in axes.split()} | {"T": T, "G": 2, "H": 2}


def inputs_of(rule: Mechanism, dtype: torch.dtype = torch.float64) -> Inputs:
    sampled = rule.sample(torch.Generator().manual_seed(0), sizes_of(rule))
    return {name: x.to(dtype) for name, x in sampled.items()}


def pool_of(rule: Mechanism, rows: int, dtype: torch.dtype = torch.float64) -> State:
    generator = torch.Generator().manual_seed(1)
    shapes = rule.state_spec(sizes_of(rule))
    return {
        n: torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in shapes.items()
    }


def input_axes(name: str) -> dict[str, list[str]]:
    return {n: domain.axes.split() for n, domain in as_mechanism(name).inputs_domain().items()}


def constants_of(name: str) -> set[str]:
    """The inputs of a rule that are the same for every token."""
    return {n for n, axes in input_axes(name).items() if axes[0] != "T"}


def backends(rule: Mechanism) -> list[str]:
    return list(backends_for(rule))


def assert_same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_rule
def test_a_name_a_spec_and_a_module_are_one_rule(name):
    rule = as_mechanism(name)
    inputs = inputs_of(rule)
    by_name = scan(name, inputs, CU_SEQLENS)
    for mechanism in (type(rule).Spec(), rule):
        out = scan(mechanism, inputs, CU_SEQLENS)
        assert_same((out.output, out.final_state), (by_name.output, by_name.final_state))


@every_rule
def test_a_module_of_a_block_scans_like_its_spec(name):
    """Parameters belong to `prepare`: a scan of the same inputs sees none of them."""
    sizes = sizes_of(as_mechanism(name))
    fields = {"num_heads": 2, "head_dim": 4, "channels": sizes.get("channels"), "state_dim": sizes.get("N")}
    fields = {k: v for k, v in fields.items() if k in find_mechanism(name).Spec.model_fields}
    fields |= {"num_slots": sizes["slots"]} if "slots" in sizes else {}
    spec = find_mechanism(name).Spec(**fields)
    module = find_mechanism(name)(spec, Context(hidden_size=8))
    inputs = inputs_of(module)
    assert_same(scan(module, inputs, CU_SEQLENS).output, scan(spec, inputs, CU_SEQLENS).output)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_shapes(name, dtype):
    """Outputs in the dtype of the values; states in float32, or float64 where any input is."""
    rule = as_mechanism(name)
    sizes = sizes_of(rule)
    for backend in backends(rule):
        out = scan(name, inputs_of(rule, dtype), CU_SEQLENS, backend=backend)
        assert out.output.dtype == dtype
        assert out.output.shape == (T, *(sizes[axis] for axis in rule.output_axes.split()))
        assert out.output.isfinite().all()
        assert list(out.final_state) == list(rule.state_axes())
        for key, shape in rule.state_spec(sizes).items():
            assert out.final_state[key].shape == (N, *shape)
            assert out.final_state[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_rule
def test_autocast_stays_outside(name):
    """Memories are float32: what autocast makes of matmuls elsewhere must not reach them."""
    rule = as_mechanism(name)
    inputs, pool = inputs_of(rule, torch.float32), pool_of(rule, N, torch.float32)
    for backend in backends(rule):
        plain = scan(name, inputs, CU_SEQLENS, initial_state=pool, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            cast = scan(name, inputs, CU_SEQLENS, initial_state=pool, backend=backend)
        assert_same((cast.output, cast.final_state), (plain.output, plain.final_state))


def test_one_float64_input_makes_float64_states():
    rule = as_mechanism("gated_deltanet")
    inputs = inputs_of(rule, torch.bfloat16) | {"g": inputs_of(rule)["g"]}
    for backend in backends(rule):
        out = scan(rule, inputs, backend=backend)
        assert out.output.dtype == torch.bfloat16
        assert out.final_state["S"].dtype == torch.float64


@every_rule
def test_bounds(name):
    """None is one sequence; int32 and int64 say the same; empty bounds hold nothing."""
    rule = as_mechanism(name)
    inputs = inputs_of(rule)
    for backend in backends(rule):
        one = scan(name, inputs, backend=backend)
        two = scan(name, inputs, torch.tensor([0, T]), backend=backend)
        assert_same((one.output, one.final_state), (two.output, two.final_state))
        wide, narrow = (scan(name, inputs, cu, backend=backend) for cu in (CU_SEQLENS, CU_SEQLENS.int()))
        assert_same((wide.output, wide.final_state), (narrow.output, narrow.final_state))
        nothing = {n: x if n in constants_of(name) else x[:0] for n, x in inputs.items()}
        for bounds in ([0], [0, 0, 0]):
            out = scan(name, nothing, torch.tensor(bounds), backend=backend)
            assert len(out.output) == 0
            assert all(len(s) == len(bounds) - 1 and (s == 0).all() for s in out.final_state.values())


@every_rule
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_index_picks_rows_of_a_pool(name, dtype):
    """Rows may be picked twice or not at all; the pool stays as it is."""
    rule = as_mechanism(name)
    inputs, pool, index = inputs_of(rule), pool_of(rule, 6), torch.tensor([5, 0, 5, 2])
    kept = {n: s.clone() for n, s in pool.items()}
    for backend in backends(rule):
        picked = scan(name, inputs, CU_SEQLENS, initial_state=pool, state_index=index.to(dtype), backend=backend)
        given = scan(name, inputs, CU_SEQLENS, initial_state={n: s[index] for n, s in pool.items()}, backend=backend)
        assert_same((picked.output, picked.final_state), (given.output, given.final_state))
        assert_same(pool, kept)
        # a segment without tokens hands its state on
        assert all(torch.equal(picked.final_state[n][1], pool[n][0]) for n in pool)


def test_state_index_gradient_adds_up():
    rule = as_mechanism("gated_deltanet")
    pool = pool_of(rule, 3)["S"].requires_grad_()
    out = scan(rule, inputs_of(rule), CU_SEQLENS, initial_state={"S": pool}, state_index=torch.tensor([0, 0, 0, 2]))
    out.final_state["S"][1].sum().backward()
    assert torch.equal(pool.grad[0], torch.ones(2, 4, 4, dtype=torch.float64))
    assert (pool.grad[1:] == 0).all()


@every_rule
def test_no_state_is_zeros(name):
    rule = as_mechanism(name)
    inputs = inputs_of(rule)
    zeros = {n: torch.zeros_like(s) for n, s in pool_of(rule, N).items()}
    for backend in backends(rule):
        given = scan(name, inputs, CU_SEQLENS, initial_state=zeros, backend=backend)
        assert_same(scan(name, inputs, CU_SEQLENS, backend=backend).output, given.output)


def test_a_state_of_another_dtype_is_cast():
    rule = as_mechanism("gated_deltanet")
    inputs, pool = inputs_of(rule), pool_of(rule, N, torch.float32)
    for backend in backends(rule):
        out = scan(rule, inputs, CU_SEQLENS, initial_state=pool, backend=backend)
        expected = scan(rule, inputs, CU_SEQLENS, initial_state={"S": pool["S"].double()}, backend=backend)
        assert_same((out.output, out.final_state), (expected.output, expected.final_state))


@pytest.mark.parametrize("name", [n for n in NAMES if any("G" in axes for axes in input_axes(n).values())])
def test_head_h_uses_key_head_h_over_r(name):
    """G key heads serve H = 2 G heads as if each were there twice, side by side."""
    rule = as_mechanism(name)
    inputs = rule.sample(torch.Generator().manual_seed(0), sizes_of(rule) | {"G": 2, "H": 4})
    repeated = {
        n: inputs[n].repeat_interleave(2, dim=axes.index("G")) if "G" in axes else inputs[n]
        for n, axes in input_axes(name).items()
    }
    for backend in backends(rule):
        few, many = (scan(name, given, CU_SEQLENS, backend=backend) for given in (inputs, repeated))
        torch.testing.assert_close((few.output, few.final_state), (many.output, many.final_state), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if constants_of(n)])
def test_constants_may_be_given_for_each_token(name):
    rule = as_mechanism(name)
    inputs = inputs_of(rule)
    expanded = inputs | {n: inputs[n].expand(T, *inputs[n].shape) for n in constants_of(name)}
    assert read_sizes(rule, expanded) == read_sizes(rule, inputs)
    for backend in backends(rule):
        once, each = (scan(name, given, CU_SEQLENS, backend=backend) for given in (inputs, expanded))
        torch.testing.assert_close((each.output, each.final_state), (once.output, once.final_state), rtol=0, atol=1e-12)


@every_rule
def test_inputs_are_left_alone(name):
    """Neither the mapping nor a tensor in it changes, whatever the order of its keys."""
    rule = as_mechanism(name)
    inputs, pool = inputs_of(rule), pool_of(rule, N)
    kept = {n: x.clone() for n, x in (inputs | pool).items()}
    for backend in backends(rule):
        turned = dict(reversed(inputs.items()))
        out = scan(name, turned, CU_SEQLENS, initial_state=pool, backend=backend)
        assert list(turned) == list(reversed(inputs))
        assert_same(inputs | pool, kept)
        assert_same(out.output, scan(name, inputs, CU_SEQLENS, initial_state=pool, backend=backend).output)
        # what comes out is not what went in
        for state in out.final_state.values():
            state.zero_()
        assert_same(inputs | pool, kept)


@every_rule
def test_run_leaves_rows_past_the_last_segment_alone(name):
    """They come out as zeros, and nothing in them goes anywhere, forward or backward."""
    rule = as_mechanism(name)
    inputs = inputs_of(rule)
    bounds = torch.tensor([0, 4, 4, 9])
    tokens = inputs.keys() - constants_of(name)
    dirty = {n: x.clone() for n, x in inputs.items()}
    for n in tokens:
        dirty[n][9:] = torch.nan
    for backend in backends(rule):
        clean = scan(rule, {n: x[:9] if n in tokens else x for n, x in inputs.items()}, bounds, backend=backend)
        leaves = {n: x.clone().requires_grad_() for n, x in dirty.items()}
        out = run(rule, leaves, bounds, backend=backend)
        assert_same((out.output[:9], out.final_state), (clean.output, clean.final_state))
        assert (out.output[9:] == 0).all()
        (out.output.sum() + sum(s.sum() for s in out.final_state.values())).backward()
        for n, x in leaves.items():
            assert x.grad.isfinite().all(), n
            assert n not in tokens or (x.grad[9:] == 0).all(), n


# backends


@every_rule
def test_auto_is_the_chunked_form_where_there_is_one(name):
    rule = as_mechanism(name)
    choice = choose_backend(rule)
    assert choice.backend == ("chunked" if rule.has_chunked_form else "reference")
    assert ("affine" in choice.reason) and choice.reason
    inputs = inputs_of(rule)
    chosen = scan(name, inputs, CU_SEQLENS, backend=choice.backend)
    assert_same(scan(name, inputs, CU_SEQLENS).output, chosen.output)


def test_what_is_asked_for_is_what_runs(monkeypatch):
    ran = []
    for name, function in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, lambda *a, name=name, function=function: ran.append(name) or function(*a))
    rule = as_mechanism("gated_deltanet")
    for backend in ("reference", "chunked"):
        assert choose_backend(rule, backend) == BackendChoice(backend, "asked for")
        scan(rule, inputs_of(rule), backend=backend)
    assert ran == ["reference", "chunked"]


@pytest.mark.parametrize("name", [name for name in NAMES if not as_mechanism(name).has_chunked_form])
def test_what_is_impossible_is_refused(name):
    rule = as_mechanism(name)
    with pytest.raises(BackendError, match=f"'chunked' can't run '{name}'.*no affine structure"):
        scan(name, inputs_of(rule), backend="chunked")


def test_why_there_is_no_kernel():
    """Each reason not to take the kernels, in the order in which they are looked for."""
    kda, delta = as_mechanism("kda"), as_mechanism("gated_deltanet")
    cuda = torch.device("cuda")
    with pytest.raises(BackendError, match="'triton' can't run 'titans': the rule declares no affine structure"):
        choose_backend(as_mechanism("titans"), "triton", device=cuda)
    with pytest.raises(BackendError, match="no kernel family serves"):
        choose_backend(kda, "triton")
    with pytest.raises(BackendError, match="kernels run on CUDA, not on cpu"):
        choose_backend(delta, "triton", device=torch.device("cpu"))
    with pytest.raises(BackendError, match="not in float64"):
        choose_backend(delta, "triton", dtype=torch.float64)
    with pytest.raises(BackendError, match="K = 300 is more than 256"):
        choose_backend(delta, "triton", sizes={"K": 300, "V": 64})
    normalized = as_mechanism(LinearAttentionSpec(normalize=True))
    with pytest.raises(BackendError, match="V = 256 is more than 255"):
        choose_backend(normalized, "triton", sizes={"K": 64, "V": 256})
    assert choose_backend(delta, "triton") == BackendChoice("triton", "asked for")


def test_an_automatic_choice_is_logged_once(caplog):
    log_choice.cache_clear()
    rule = as_mechanism("gated_deltanet")
    with caplog.at_level(logging.INFO, logger="momkit"):
        for _ in range(3):
            scan(rule, inputs_of(rule))
        scan(rule, inputs_of(rule), backend="reference")
        block = MoMSpec(hidden_size=8).build()
        block(torch.randn(1, 3, 8))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("gated_deltanet runs on chunked: ")
    assert choose_backend(rule).reason in lines[0]


def test_backends_agree_where_chunks_meet():
    """Segments around and over the length of a chunk, with states; the kit does the rest."""
    rule = as_mechanism("gated_deltanet")
    cu_seqlens = torch.tensor([0, 63, 127, 192, 192, 193, 340])
    inputs = rule.sample(torch.Generator().manual_seed(0), sizes_of(rule) | {"T": 340})
    pool = pool_of(rule, 6)
    step, chunk = (scan(rule, inputs, cu_seqlens, initial_state=pool, backend=b) for b in ("reference", "chunked"))
    torch.testing.assert_close((chunk.output, chunk.final_state), (step.output, step.final_state), rtol=0, atol=1e-11)
