"""What a block is said to cost is what a built block holds, and what a token meets is what it touches."""

import pytest
import torch

from momkit import MoMSpec
from momkit.accounting import active_memories, flops_per_token, measure, parameters, state_bytes
from momkit.registry import registry

RULES = registry().names("mechanism")
ROUTERS = registry().names("router")
VARIANTS = [{}, {"shared_memory": False}, {"conv_size": None, "output_gate": False}, {"num_memories": 2}]


def specs():
    for name in RULES:
        yield MoMSpec(hidden_size=24, mechanism=name)
    for name in ROUTERS:
        yield MoMSpec(hidden_size=24, num_memories=5, router=name)
    for variant in VARIANTS:
        yield MoMSpec(
            hidden_size=24, mechanism={"kind": "gla", "num_heads": 3, "head_dim": 5, "head_v_dim": 7}, **variant
        )


@pytest.mark.parametrize("spec", [*specs()], ids=lambda s: f"{s.mechanism.kind}-{s.router.kind}")
def test_costs_are_those_of_a_built_block(spec):
    block = spec.build()
    costs = measure(spec)
    assert costs.parameters.total == sum(p.numel() for p in block.parameters())
    assert costs.state_bytes.total == block.initial_state(1).nbytes()
    assert costs.state_bytes.total == block(torch.randn(1, 3, spec.hidden_size)).state.nbytes()
    assert costs.parameters == parameters(block)
    assert costs.state_bytes == state_bytes(block)
    assert costs.flops_per_token == flops_per_token(block)
    assert all(flops >= 0 for flops in costs.flops_per_token.values())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shared", [False, True])
def test_active_is_what_one_token_touches(router, shared):
    torch.manual_seed(0)
    spec = MoMSpec(hidden_size=16, num_memories=6, shared_memory=shared, router=router)
    block = spec.build().eval()
    before = block.initial_state(1)
    # random, so that a memory that only reads touches its projections too; ones would do for writes
    for tensor in before.recurrent.values():
        tensor.normal_()
    out = block(torch.randn(1, 1, 16), before)
    touched = set(out.routing.memory_ids.flatten().tolist())
    met = len(touched) + shared
    assert met <= active_memories(block) == min(block.router.slots, 6) + shared
    if out.routing.writes is None:
        assert met == active_memories(block)
        out.hidden_states.sum().backward()
        by_memory = block.project.memory_weight.grad.flatten(1).abs().sum(1) > 0
        assert int(by_memory.sum()) == met
        per_memory = block.project.memory_weight[0].numel()
        count = parameters(block)
        assert count.total - count.active == (block.num_groups - met) * per_memory
        changed = [
            not torch.equal(out.state.recurrent["S"][0, m], before.recurrent["S"][0, m])
            for m in range(block.num_groups)
        ]
        assert sum(changed) == met
        assert state_bytes(block).active * block.num_groups == state_bytes(block).total * met


@pytest.mark.parametrize("name", RULES)
def test_one_memory_is_all_active(name):
    costs = measure(
        MoMSpec(hidden_size=24, num_memories=1, shared_memory=False, mechanism=name, router={"kind": "dense"})
    )
    assert costs.parameters.total == costs.parameters.active
    assert costs.state_bytes.total == costs.state_bytes.active


def test_operations_of_the_default_block_by_hand():
    D, H, K, J, M = 256, 2, 32, 3, 4
    spec = MoMSpec(hidden_size=D, mechanism={"kind": "gated_deltanet", "num_heads": H, "head_dim": K})
    flops = measure(spec).flops_per_token
    assert flops["projections"] == 2 * D * H * K + J * 2 * D * (2 * H * K + 2 * H)
    assert flops["short_conv"] == J * 2 * 4 * 3 * H * K
    assert flops["combine"] == J * 2 * H * K
    # decay 1, two reads of 2 each, write: product 1 and sum 1; what is linear in K comes on top
    assert 0 <= flops["rule"] - J * 7 * H * K * K <= J * 16 * H * K
    assert 0 <= flops["router"] - 2 * D * M <= 64
    assert 0 <= flops["output"] - 2 * 2 * D * H * K <= 16 * H * K


def test_operations_grow_with_slots_and_sizes():
    def flops(top_k=1, **changes):
        router = {"kind": "softmax_topk", "top_k": top_k}
        return measure(MoMSpec(hidden_size=32, shared_memory=False, router=router, **changes)).flops_per_token

    assert flops(top_k=3)["rule"] == 3 * flops(top_k=1)["rule"]
    assert flops(num_memories=64)["rule"] == flops(num_memories=2)["rule"]
    assert flops(conv_size=None)["short_conv"] == 0
    wide = {"kind": "mamba", "expand": 4}
    narrow = {"kind": "mamba", "expand": 2}
    assert flops(mechanism=wide)["rule"] > flops(mechanism=narrow)["rule"]


def test_a_large_block_costs_nothing_to_measure():
    spec = MoMSpec(hidden_size=16384, num_memories=64)
    assert measure(spec).parameters.total > 10**10
