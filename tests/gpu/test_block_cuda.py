"""The block on a GPU: the conformance kit, the truth, graphs, compilation, synchronisation, bits, precisions, decoding.

Every rule with the paper's router and every router with the paper's rule is a case of its own, so that a part of them
can be chosen: `pytest tests/gpu/test_block_cuda.py -k "gated_deltanet-softmax_topk"`.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from momkit import MoMBlock, MoMSpec
from momkit.mechanisms.base import HeadSpec
from momkit.registry import find_mechanism, registry
from momkit.scan import choose_backend
from momkit.state import MoMState
from momkit.testing.oracle import gradients_of
from momkit.testing.strategies import bounds
from momkit.testing.subjects import BlockSubject, disturb
from momkit.testing.suite import BoundCheck, bound_checks
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
D = 64
LENGTHS = (70, 0, 129, 1)
RULES = registry().names("mechanism")
ROUTERS = registry().names("router")
PAIRS = [(rule, "softmax_topk") for rule in RULES] + [("gated_deltanet", r) for r in ROUTERS if r != "softmax_topk"]
FLOAT32 = ("mechanism.A_log", "mechanism.dt_bias", "router.weight")
DTYPES = [torch.float32, torch.bfloat16]


def is_fused(rule: str) -> bool:
    """Whether kernels run a rule; what plain torch runs may wait for the GPU and is compiled length by length."""
    cls = find_mechanism(rule)
    return choose_backend(cls(cls.Spec()), device=CUDA, dtype=torch.bfloat16, backend="auto").backend not in (
        "reference",
        "chunked",
    )


def over(pairs):
    return pytest.mark.parametrize("pair", pairs, ids=["-".join(pair) for pair in pairs])


every_block = over(PAIRS)
every_fused_block = over([pair for pair in PAIRS if is_fused(pair[0])])
every_router = over([("gated_deltanet", router) for router in ROUTERS])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def make(pair, dtype=torch.float32, device=CUDA) -> MoMBlock:
    """A small block in evaluation, the same numbers in every dtype and on every device."""
    rule, router = pair
    heads = issubclass(find_mechanism(rule).Spec, HeadSpec)
    sizes = {"num_heads": 2, "head_dim": 32} if heads else {"channels": 64}
    torch.manual_seed(0)
    block = MoMSpec.model_validate(
        {"hidden_size": D, "mechanism": {"kind": rule, **sizes}, "router": {"kind": router}}
    ).build()
    disturb(block)
    return block.eval().to(device, dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forward_and_backward(block, x, state=None, weight=None, **options):
    """Outputs, loss, final states and all gradients, by name; and the routing."""
    x = x.detach().requires_grad_()
    out = block(x, state, **options)
    results = {"hidden_states": out.hidden_states, "aux_loss": out.aux_loss}
    results |= {f"state {n}": tensor for n, tensor in {**out.state.recurrent, **out.state.conv}.items()}
    weight = torch.ones_like(x) if weight is None else weight
    total = (out.hidden_states * weight.to(x.dtype)).float().sum() + out.aux_loss
    # a block of one decay has states that no gradient reaches
    total = total + sum(tensor.float().square().mean() for tensor in out.state.recurrent.values())
    leaves = {"x": x, **dict(block.named_parameters())}
    gradients = {f"gradient of {name}": g for name, g in gradients_of(total, leaves).items()}
    return {n: tensor.detach() for n, tensor in (results | gradients).items()}, out.routing


# the conformance kit


class There(TorchFunctionMode):
    """What a check makes is made on the GPU, and in `dtype` where the check asks for float64."""

    # where torch makes a tensor of no other; a check draws from generators of the CPU
    MAKERS = (torch.arange, torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.tensor, torch.zeros)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float64:
            kwargs["dtype"] = self.dtype
        made = func(*args, **kwargs)
        return made.to(CUDA) if func in self.MAKERS and kwargs.get("device") is None else made


@dataclass(frozen=True)
class BlockThere(BlockSubject):
    """A block on the GPU."""

    dtype: torch.dtype = torch.float64

    def build(self, spec, seed):
        return super().build(spec, seed).to(CUDA, self.dtype)


def block_checks(targets, dtype):
    """Every check of the kit on the blocks around rules or routers."""
    checks = [check for check, _ in bound_checks(targets, device=CUDA) if isinstance(check.subject, BlockSubject)]
    there = [BoundCheck(BlockThere(c.subject.name, c.subject.about, dtype), c.check) for c in checks]
    return pytest.mark.parametrize("check", [pytest.param(check, id=check.id) for check in there])


@block_checks(RULES, torch.float32)
def test_rules_in_float32(check):
    with There(torch.float32):
        check()


@block_checks(ROUTERS, torch.float32)
def test_routers_in_float32(check):
    with There(torch.float32):
        check()


@block_checks([*RULES, *ROUTERS], torch.float64)
def test_in_float64(check):
    with There(torch.float64):
        check()


# the truth


@every_dtype
@every_block
def test_agrees_with_float64(pair, dtype):
    """Outputs, loss, states and every gradient; the same block on the CPU in the same dtype sets what is allowed."""
    x, weight = random(sum(LENGTHS), D).to(dtype), random(sum(LENGTHS), D, seed=2)
    blocks = {"there": make(pair, dtype), "eager": make(pair, dtype, "cpu")}
    blocks["truth"] = make(pair, dtype, "cpu").double()
    found, routes = {}, {}
    for name, block in blocks.items():
        given = x.to(block.out_proj.weight)
        where = given.device
        found[name], routing = forward_and_backward(
            block, given, weight=weight.to(where), cu_seqlens=bounds(LENGTHS).to(where)
        )
        routes[name] = routing.memory_ids.cpu()
    for name in ("there", "eager"):
        assert_equal(routes[name], routes["truth"], f"{pair}: routes in {dtype}, {name}")
    there = {name: tensor.cpu() for name, tensor in found["there"].items()}
    assert_all_as_good(there, found["eager"], found["truth"], dtype)


@every_dtype
@every_block
def test_prefill_in_chunks_then_decoding_is_the_whole(pair, dtype):
    x = random(3, 40, D).to(dtype)
    with torch.no_grad():
        eager = make(pair, dtype, "cpu")(x)
        truth = make(pair, dtype, "cpu").double()(x.double())
        block, state, outputs, routes = make(pair, dtype), None, [], []
        for piece in x.to(CUDA).split([17, 2, 1, 12, 8], 1):
            if piece.shape[1] == 8:
                for token in piece.unbind(1):
                    out = block.step(token, state)
                    outputs.append(out.hidden_states[:, None])
                    routes.append(out.routing.memory_ids.view(3, 1, -1))
                continue
            out = block(piece, state)
            state = out.state
            outputs.append(out.hidden_states)
            routes.append(out.routing.memory_ids.view(*piece.shape[:2], -1))
    routes = torch.cat(routes, 1).flatten(0, 1).cpu()
    assert_equal(routes, truth.routing.memory_ids, f"{pair}: routes of the pieces")
    assert_equal(eager.routing.memory_ids, truth.routing.memory_ids, f"{pair}: routes in {dtype}")

    def named(outputs, state):
        return {"hidden_states": outputs, **state.recurrent, **{f"conv {n}": t for n, t in state.conv.items()}}

    there = {name: tensor.cpu() for name, tensor in named(torch.cat(outputs, 1), state).items()}
    expected = named(truth.hidden_states, truth.state)
    assert_all_as_good(there, named(eager.hidden_states, eager.state), expected, dtype)


# the device runs ahead of the host


@every_fused_block
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation(pair):
    block = make(pair, torch.bfloat16)
    packed, cu_seqlens = random(sum(LENGTHS), D).to(CUDA, torch.bfloat16), bounds(LENGTHS).to(CUDA)
    padded, mask = random(3, 50, D, seed=2).to(CUDA, torch.bfloat16), (random(3, 50, seed=3) > 0).to(CUDA)
    state, token = block.initial_state(3), padded[:, 0]

    def everything():
        forward_and_backward(block, packed, cu_seqlens=cu_seqlens)
        forward_and_backward(block, padded, state, mask=mask)
        block.step(token, state)

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call):
    """The graph of a call, after calls on a stream of its own, and what it fills when it is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@every_fused_block
def test_a_captured_training_step_replays_with_new_data(pair):
    block = make(pair, torch.bfloat16)
    total = sum(LENGTHS)
    x, cu_seqlens = random(total, D).to(CUDA, torch.bfloat16), bounds(LENGTHS).to(CUDA)
    mask = torch.ones(total, dtype=torch.bool, device=CUDA)
    graph, found = captured(lambda: forward_and_backward(block, x, cu_seqlens=cu_seqlens, mask=mask)[0])
    for seed, lengths in ((2, (1, 99, 0, 100)), (3, (0, 0, 200, 0)), (1, LENGTHS)):
        new, kept = random(total, D, seed=seed).to(x), (random(total, seed=seed + 9) > -1).to(CUDA)
        for old, value in ((x, new), (cu_seqlens, bounds(lengths).to(CUDA)), (mask, kept)):
            old.copy_(value)
        graph.replay()
        expected, _ = forward_and_backward(block, new, cu_seqlens=bounds(lengths).to(CUDA), mask=kept)
        for name, tensor in expected.items():
            assert_equal(found[name], tensor, f"{pair}: {name} of a replay")


@every_fused_block
def test_a_captured_decoding_step_replays_with_new_data(pair):
    block = make(pair, torch.bfloat16)
    x, state = random(5, D).to(CUDA, torch.bfloat16), block.initial_state(5)
    graph, output = captured(lambda: block.step(x, state).hidden_states)
    start = block(random(5, 30, D, seed=2).to(x)).state.detach()
    for mine, given in ((state.recurrent, start.recurrent), (state.conv, start.conv)):
        for name, tensor in mine.items():
            tensor.copy_(given[name])
    for seed in range(3, 6):
        x.copy_(random(5, D, seed=seed))
        graph.replay()
        assert_equal(output, block.step(x, start).hidden_states, f"{pair}: output of a replay")
    for mine, given in ((state.recurrent, start.recurrent), (state.conv, start.conv)):
        for name, tensor in mine.items():
            assert_equal(tensor, given[name], f"{pair}: {name} after replays")


# compilation


@every_fused_block
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiles_whole_and_seldom(pair):
    block, counter, frames = make(pair), CompileCounterWithBackend("aot_eager"), []

    def run(x, cu_seqlens):
        out = block(x, cu_seqlens=cu_seqlens)
        return {"hidden_states": out.hidden_states, "aux_loss": out.aux_loss, **out.state.recurrent}

    def gradients(results):
        total = sum(tensor.square().sum() for tensor in results.values())
        return gradients_of(total, dict(block.named_parameters()))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for length in (*range(2, 50, 3), 1, 0):
        x, cu_seqlens = random(length, D, seed=length).to(CUDA), bounds((length,)).to(CUDA)
        found, expected = compiled(x, cu_seqlens), run(x, cu_seqlens)
        frames.append(counter.frame_count)
        for name, tensor in expected.items():
            assert_equal(found[name], tensor, f"{pair}: {name} of {length} tokens, compiled")
        true = gradients(expected)
        for name, tensor in gradients(found).items():
            assert_equal(tensor, true[name], f"{pair}: gradient of {name}, {length} tokens, compiled")
    assert frames[-3] <= 2, f"{pair}: {frames[-3]} compilations for 16 lengths from 2 on"
    assert frames[-1] <= 4, f"{pair}: {frames[-1]} compilations with lengths 1 and 0"
    torch._dynamo.reset()


@every_fused_block
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_decoding_step_compiles_whole_and_seldom(pair):
    block, counter = make(pair), CompileCounterWithBackend("aot_eager")

    def run(x, recurrent, conv):
        return block.step(x, MoMState(dict(recurrent), dict(conv))).hidden_states

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in range(2, 20, 3):
        x, state = random(batch, D, seed=batch).to(CUDA), block.initial_state(batch)
        expected_state = state.clone()
        for _ in range(2):
            found = compiled(x, state.recurrent, state.conv)
            assert_equal(found, block.step(x, expected_state).hidden_states, f"{pair}: batch {batch}, compiled")
        for name, tensor in expected_state.recurrent.items():
            assert_equal(state.recurrent[name], tensor, f"{pair}: state {name}, batch {batch}, compiled")
    assert counter.frame_count <= 2, f"{pair}: {counter.frame_count} compilations for 6 batch sizes"
    torch._dynamo.reset()


# what inductor warns of is about kernels that are not ours
@every_fused_block
@pytest.mark.filterwarnings("default")
def test_inductor_gives_what_eager_gives(pair):
    block, x = make(pair, torch.bfloat16), random(sum(LENGTHS), D).to(CUDA, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, cu: block(x, cu_seqlens=cu).hidden_states, fullgraph=True)
    truth = make(pair, torch.bfloat16, "cpu").double()(x.cpu().double(), cu_seqlens=bounds(LENGTHS))
    eager = block(x, cu_seqlens=bounds(LENGTHS).to(CUDA))
    found = compiled(x, bounds(LENGTHS).to(CUDA))
    names = ({"hidden_states": t.detach().cpu()} for t in (found, eager.hidden_states, truth.hidden_states))
    assert_all_as_good(*names, torch.bfloat16)
    torch._dynamo.reset()


# bits


@every_router
def test_a_million_tokens_go_the_same_ways_twice(pair):
    block, x = make(pair, torch.bfloat16), torch.randn(8, 2**17, D, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        first, second = block(x), block(x)
    flips = int((first.routing.memory_ids != second.routing.memory_ids).sum())
    assert flips == 0, f"{pair}: {flips} choices of {2**20} tokens are others in a second run"
    assert_equal(second.routing.weights, first.routing.weights, f"{pair}: routing weights of a second run")
    assert_equal(second.hidden_states, first.hidden_states, f"{pair}: hidden_states of a second run")


@every_dtype
@every_block
def test_runs_give_the_same_bits(pair, dtype):
    block, x = make(pair, dtype), random(4, 300, D).to(CUDA, dtype)
    first, _ = forward_and_backward(block, x)
    for _ in range(3):
        for name, tensor in forward_and_backward(block, x)[0].items():
            assert_equal(tensor, first[name], f"{pair}: {name} of another run")


@every_block
def test_activation_checkpointing(pair):
    """Recomputed, the same routes and the same gradients to the last bit, also with noise in the router."""
    block = make(pair, torch.bfloat16).train()
    state = block(random(3, 20, D, seed=3).to(CUDA, torch.bfloat16)).state.detach()
    results, routes, route = [], [], block.route

    def recorded(x, mask):
        routing = route(x, mask)
        routes.append(routing.memory_ids)
        return routing

    def forward(x):
        out = block(x, state)
        return out.hidden_states, out.aux_loss

    # recomputation ends before forward does: what is seen of it is seen inside
    block.route = recorded
    for recompute in (False, True):
        x = random(3, 40, D).to(CUDA, torch.bfloat16).requires_grad_()
        torch.manual_seed(7)
        y, aux_loss = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        leaves = {"x": x, **dict(block.named_parameters())}
        results.append(gradients_of(y.float().square().sum() + aux_loss, leaves))
    assert len(routes) == 3, f"{pair}: nothing was recomputed"
    for ids in routes[1:]:
        assert_equal(ids, routes[0], f"{pair}: routes, recomputed")
    for name, gradient in results[0].items():
        assert_equal(results[1][name], gradient, f"{pair}: gradient of {name}, recomputed")


# precisions


@every_block
def test_autocast(pair):
    """Matmuls in bfloat16; memories, routing and gates in float32; gradients in the parameters' float32."""
    x = random(3, 60, D)
    truth = make(pair, device="cpu").double()(x.double())
    block, given = make(pair), x.to(CUDA).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = block(given)
    with torch.autocast("cpu", torch.bfloat16):
        eager = make(pair, device="cpu")(x)
    assert out.hidden_states.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in out.state.recurrent.values()} == {torch.float32}
    assert out.routing.weights.dtype == out.routing.logits.dtype == out.aux_loss.dtype == torch.float32
    assert_equal(out.routing.memory_ids.cpu(), truth.routing.memory_ids, f"{pair}: routes under autocast")
    names = ({"hidden_states": o.hidden_states.detach().cpu()} for o in (out, eager, truth))
    assert_all_as_good(*names, torch.bfloat16)
    total = out.hidden_states.float().square().sum() + out.aux_loss
    for name, gradient in gradients_of(total, {"x": given, **dict(block.named_parameters())}).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), f"{pair}: gradient of {name}"
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        whole = block(x.to(CUDA), out.state.detach()).hidden_states[:, 0]
        stepped = block.step(x[:, 0].to(CUDA), out.state.detach().clone()).hidden_states
    assert_all_as_good({"step": stepped.cpu()}, {"step": whole.cpu()}, {"step": whole.cpu().double()}, torch.bfloat16)


def test_bfloat16_with_gates_and_router_in_float32():
    """They stay float32 through a training step, with gradients in float32, and route as they did before the cast."""
    pair = ("gated_deltanet", "softmax_topk")
    x = random(3, 60, D).to(CUDA, torch.bfloat16)
    before = make(pair)
    block = make(pair, torch.bfloat16)
    for name in FLOAT32:
        block.get_parameter(name).data = before.get_parameter(name).detach().clone()
    optimizer = torch.optim.AdamW(block.parameter_groups(), lr=1e-4)
    out = block(x)
    assert_equal(out.routing.memory_ids, before(x.float()).routing.memory_ids, "routes of a router in float32")
    (out.hidden_states.float().square().sum() + out.aux_loss).backward()
    for name, parameter in block.named_parameters():
        expected = torch.float32 if name in FLOAT32 else torch.bfloat16
        assert parameter.dtype == parameter.grad.dtype == expected, f"{name}: {parameter.dtype}, {parameter.grad.dtype}"
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    old = {name: block.get_parameter(name).detach().clone() for name in FLOAT32}
    optimizer.step()
    for name in FLOAT32:
        parameter = block.get_parameter(name)
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, old[name]), name
    state = block.initial_state(3)
    assert block.step(x[:, 0], state).hidden_states.dtype == torch.bfloat16
