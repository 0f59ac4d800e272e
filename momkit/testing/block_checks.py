"""Checks of a whole block around a rule or a router: what hidden states may depend on, and their definition."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from momkit.spec import MoMSpec
from momkit.testing.blocks import BlockCase, block_cases, hidden_states, is_noisy, scripted_case
from momkit.testing.by_hand import block_by_hand, memory_by_hand
from momkit.testing.drawing import Draw, applies_if, drawn
from momkit.testing.oracle import gradients_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.strategies import bounds, masks, seeds
from momkit.testing.subjects import HIDDEN_SIZE, BlockSubject, RuleSubject, registered
from momkit.testing.tolerances import assert_close, assert_equal


# the block is its definition: outputs, final states, and the gradient of every parameter and token
@drawn()
def check_definition(subject: BlockSubject, draw: Draw) -> None:
    case, routing = scripted_case(subject, draw, max_tokens=24)
    results = []
    for by_hand in (False, True):
        x = case.x.clone().requires_grad_()
        if by_hand:
            y, state = block_by_hand(case.block, x, case.lengths, routing)
        else:
            out = case.block(x, cu_seqlens=case.cu_seqlens)
            y, state = out.hidden_states, out.state.recurrent
        weight = case.random(case.seed + 5, *y.shape)
        total = (y * weight).sum() + sum(s.square().sum() for s in state.values())
        leaves = {"x": x, **dict(case.block.named_parameters())}
        gradients = {f"gradient of {name}": g for name, g in gradients_of(total, leaves).items()}
        results.append({"hidden_states": y, **{f"state {n}": s for n, s in state.items()}, **gradients})
    for name, expected in results[1].items():
        assert_close(results[0][name], expected, f"{subject.id}: {name}, against the definition")


def is_about_a_rule(subject: BlockSubject) -> bool:
    return isinstance(subject.about, RuleSubject)


# one memory that takes every token is the bare rule
@applies_if(is_about_a_rule)
@drawn(0.5)
def check_one_memory_is_the_bare_rule(subject: BlockSubject, draw: Draw) -> None:
    drawn_case = draw(block_cases(subject, max_tokens=30, max_sequences=1), "case")
    case = replace(drawn_case, num_memories=1, shared_memory=False)
    output, final = memory_by_hand(case.block, case.x, 0, [True] * case.num_tokens)
    normed = output / (output.square().mean(-1, keepdim=True) + case.block.spec.norm_eps).sqrt()
    gate = case.block.gate_proj(case.x).reshape(normed.shape)  # type: ignore[misc]
    expected = case.block.out_proj((normed * case.block.norm_weight * nn.functional.silu(gate)).flatten(1))
    out = case.block(case.x)
    assert_close(out.hidden_states, expected, f"{subject.id}: one memory, against the bare rule")
    for name, tensor in final.items():
        assert_close(out.state.recurrent[name][:, 0], tensor, f"{subject.id}: state {name}, against the bare rule")


# changing the future leaves the past as it was, in training and in evaluation
@drawn()
def check_causal(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject), "case")
    b = draw(st.integers(0, len(case.lengths) - 1), "sequence")
    t = case.sequence(b).start + draw(st.integers(0, case.lengths[b]), "first changed token")
    case.block.train(draw(st.booleans(), "training"))
    x = case.x.clone()
    x[t:] = case.random(case.seed + 2, *x[t:].shape)
    assert_close(hidden_states(case, x)[:t], hidden_states(case, case.x)[:t], f"{subject.id}: tokens before {t}")


# a sequence sees nothing of the others, in training and in evaluation
@drawn()
def check_sequences_isolated(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, min_sequences=2), "case")
    b = draw(st.integers(0, len(case.lengths) - 1), "sequence that changes")
    case.block.train(draw(st.booleans(), "training"))
    x = case.x.clone()
    inside = case.sequence(b)
    x[inside] = case.random(case.seed + 2, case.lengths[b], HIDDEN_SIZE)
    kept = torch.ones(case.num_tokens, dtype=torch.bool)
    kept[inside] = False
    assert_close(hidden_states(case, x)[kept], hidden_states(case, case.x)[kept], f"{subject.id}: beside sequence {b}")


# packed, padded on the left or on the right, or one by one: the same outputs and states
@drawn(0.5)
def check_packing_padding_loop(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, min_sequences=2), "case")
    left = draw(st.booleans(), "padding on the left")
    packed = case.block(case.x, cu_seqlens=case.cu_seqlens)
    longest = max(case.lengths)
    batch, mask = torch.full((len(case.lengths), longest, HIDDEN_SIZE), torch.nan, dtype=torch.float64), []
    for b, length in enumerate(case.lengths):
        place = torch.arange(longest) >= longest - length if left else torch.arange(longest) < length
        batch[b, place] = case.x[case.sequence(b)]
        mask.append(place)
    padded = case.block(batch, mask=torch.stack(mask))
    assert_close(padded.hidden_states[torch.stack(mask)], packed.hidden_states, f"{subject.id}: padded")
    assert padded.hidden_states.isfinite().all(), f"{subject.id}: NaN at padding reaches the output"
    assert_close(padded.aux_loss, packed.aux_loss, f"{subject.id}: aux_loss of padded sequences")
    loop = [case.block(case.x[case.sequence(b)]) for b in range(len(case.lengths))]
    assert_close(torch.cat([o.hidden_states for o in loop]), packed.hidden_states, f"{subject.id}: one by one")
    for part in ("recurrent", "conv"):
        for name, tensor in getattr(packed.state, part).items():
            assert_close(getattr(padded.state, part)[name], tensor, f"{subject.id}: {part} {name}, padded")
            one_by_one = torch.cat([getattr(o.state, part)[name] for o in loop])
            assert_close(one_by_one, tensor, f"{subject.id}: {part} {name}, one by one")


# masked tokens, wherever they stand and whatever they hold, take part in nothing
@drawn()
def check_mask(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, max_tokens=12, max_sequences=1), "case")
    mask = draw(masks(2, case.num_tokens), "mask")
    x = case.random(case.seed + 3, 2, case.num_tokens, HIDDEN_SIZE)
    x = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    out = case.block(x, mask=mask)
    kept = case.block(x.detach()[mask], cu_seqlens=bounds(tuple(mask.sum(1).tolist())))
    assert_close(out.hidden_states[mask], kept.hidden_states, f"{subject.id}: without its masked tokens")
    assert_close(out.aux_loss, kept.aux_loss, f"{subject.id}: aux_loss without its masked tokens")
    assert out.hidden_states.isfinite().all(), f"{subject.id}: NaN at masked tokens reaches the output"
    for part in ("recurrent", "conv"):
        for name, tensor in getattr(kept.state, part).items():
            assert_close(getattr(out.state, part)[name], tensor, f"{subject.id}: {part} {name} beside masked tokens")
    grad = gradients_of(out.hidden_states.square().sum() + out.aux_loss, {"x": x})["x"]
    assert not grad[~mask].any(), f"{subject.id}: a masked token gets a gradient"


# training computes what evaluation does, unless the router draws noise
@drawn(0.5)
def check_train_is_eval(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject), "case")
    if is_noisy(case.block):
        return
    evaluated = hidden_states(case, case.x)
    case.block.train()
    assert_equal(hidden_states(case, case.x), evaluated, f"{subject.id}: training against evaluation")


# every parameter gets a gradient from outputs and aux_loss
@drawn(0.3)
def check_every_parameter_gets_a_gradient(subject: BlockSubject, draw: Draw) -> None:
    # with as many memories as choices nothing is chosen, and a router has nothing to learn
    case = BlockCase(subject, (30, 20), draw(seeds, "seed"), max(subject.legal_memories()))
    case.block.train()
    out = case.block(case.x, cu_seqlens=case.cu_seqlens)
    total = (out.hidden_states * case.random(case.seed + 4, *out.hidden_states.shape)).sum() + out.aux_loss
    total.backward()
    for name, parameter in case.block.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.any(), f"{subject.id}: {name} gets no gradient"
        assert grad.isfinite().all(), f"{subject.id}: {name} gets a gradient that is not finite"


# the same call gives the same bits, forward and backward, whatever uninitialised memory holds
@drawn(0.5)
def check_repeatable_and_written(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject), "case")
    first, second = forward_and_backward(case), forward_and_backward(case)
    with poisoned_empty():
        poisoned = forward_and_backward(case)
    for name, tensor in first.items():
        assert_equal(second[name], tensor, f"{subject.id}: {name} of a second run")
        assert_equal(poisoned[name], tensor, f"{subject.id}: {name} from poisoned memory")


def forward_and_backward(case: BlockCase) -> dict[str, Tensor]:
    x = case.x.clone().requires_grad_()
    out = case.block(x, cu_seqlens=case.cu_seqlens)
    total = out.hidden_states.square().sum() + out.aux_loss
    leaves = {"x": x, **dict(case.block.named_parameters())}
    grads = {f"gradient of {name}": g for name, g in gradients_of(total, leaves).items()}
    states = {f"state {n}": s.detach() for n, s in {**out.state.recurrent, **out.state.conv}.items()}
    return {"hidden_states": out.hidden_states.detach(), **states, **grads}


# a block is the same after its spec has been to YAML and its weights to a state dict
@drawn(0.3)
def check_rebuilds_from_spec(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject), "case")
    spec = case.block.spec
    with registered(subject.about.cls):
        again = subject.build(MoMSpec.model_validate_json(spec.model_dump_json()), case.seed + 1)
    again.load_state_dict(case.block.state_dict())
    assert again.spec == spec, f"{subject.id}: {again.spec!r} is not {spec!r}"
    expected = case.block(case.x, cu_seqlens=case.cu_seqlens).hidden_states
    assert_equal(again(case.x, cu_seqlens=case.cu_seqlens).hidden_states, expected, f"{subject.id}: rebuilt")
