"""Tests of the tests: faults are seeded into the library, one at a time, and the named check must catch each.

A fault is a function that patches it in; the decorator names the check, by the id that `momkit check` shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

import pytest
import torch
from pydantic import ConfigDict

from momkit import ops
from momkit.mechanisms.base import Structure, outer, read, take
from momkit.mechanisms.gated_deltanet import GatedDeltaNet, GatedDeltaNetSpec
from momkit.mechanisms.reference import scan_reference, start_state
from momkit.routing import dispatch
from momkit.routing.sigmoid_topk import SigmoidTopK
from momkit.scan import BACKENDS
from momkit.state import MoMState
from momkit.testing.suite import bound_checks

Patch = pytest.MonkeyPatch
block, projection, softmax_topk = (
    import_module(f"momkit.{name}") for name in ("block", "projection", "routing.softmax_topk")
)
scan_module = import_module("momkit.scan")  # momkit.scan itself is the function


@dataclass(frozen=True)
class Fault:
    """name: what is wrong. check: the id of the check that must say so. target: a class, where no name will do."""

    name: str
    check: str
    seed: Callable[[Patch], None]
    target: type | None = None


FAULTS: list[Fault] = []


def caught_by(check: str, target: type | None = None):
    def add(seed):
        FAULTS.append(Fault(seed.__name__, check, seed, target))
        return seed

    return add


def on_chunked(patch: Patch, scan) -> None:
    """Let the chunked backend be `scan(mechanism, inputs, cu_seqlens, state, sizes)`, given zeros where no state is."""

    def started(mechanism, inputs, cu_seqlens, state, sizes):
        return scan(mechanism, inputs, cu_seqlens, start_state(mechanism, inputs, cu_seqlens, state, sizes), sizes)

    patch.setitem(BACKENDS, "chunked", started)


def with_inputs(patch: Patch, change, backend: str = "chunked") -> None:
    """Let a backend see `change(inputs, cu_seqlens)`."""

    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        return scan_reference(mechanism, change(inputs, cu_seqlens), cu_seqlens, state, sizes)

    patch.setitem(BACKENDS, backend, scan)


def with_results(patch: Patch, change) -> None:
    """Let the chunked backend return `change(output, final_state, cu_seqlens, initial_state)`."""

    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        return change(*scan_reference(mechanism, inputs, cu_seqlens, state, sizes), cu_seqlens, state)

    on_chunked(patch, scan)


def with_rule(patch: Patch, **methods) -> None:
    """Let the chunked backend run the gated delta rule with other methods."""
    wrong = type("Wrong", (GatedDeltaNet,), methods)

    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        return scan_reference(wrong(mechanism.spec), inputs, cu_seqlens, state, sizes)

    on_chunked(patch, scan)


def in_chunks(
    patch: Patch, *, carried=lambda state, final: final, chunk=lambda start, end: (start, end), size=16
) -> None:
    """Let the chunked backend walk each segment in chunks.

    carried: the state that goes on, from the one a chunk began and ended with. chunk: the bounds that it really has.
    """

    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        domain = mechanism.inputs_domain()
        output = torch.zeros_like(inputs["v"])
        finals = {name: [] for name in state}
        for n, (first, last) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            now = {name: tensor[n : n + 1] for name, tensor in state.items()}
            for start in range(first, last, size):
                a, b = chunk(start, min(start + size, last))
                rows = {k: x[a:b] if domain[k].axes[0] == "T" else x for k, x in inputs.items()}
                part, end = scan_reference(mechanism, rows, torch.tensor([0, b - a]), now, sizes)
                output = output.index_copy(0, torch.arange(a, b), part)
                now = carried(now, end)
            for name, tensor in now.items():
                finals[name].append(tensor)
        return output, {name: torch.cat(rows) if rows else state[name] for name, rows in finals.items()}

    on_chunked(patch, scan)


def detached(state):
    return {name: tensor.detach() for name, tensor in state.items()}


# scans: what a backend gets wrong


@caught_by("gated_deltanet-chunked-check_gradients_match_reference")
def initial_state_gets_no_gradient(patch):
    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        return scan_reference(mechanism, inputs, cu_seqlens, detached(state), sizes)

    on_chunked(patch, scan)


@caught_by("gated_deltanet-chunked-check_gradients_match_reference")
def final_state_gives_no_gradient(patch):
    with_results(patch, lambda output, final, cu, state: (output, detached(final)))


@caught_by("gated_deltanet-chunked-check_gradients_match_reference")
def gate_gets_no_gradient(patch):
    with_inputs(patch, lambda inputs, cu: inputs | {"g": inputs["g"].detach()})


@caught_by("gated_deltanet-chunked-check_gradient_of_one_input")
def gradients_only_for_those_who_ask_for_all(patch):
    def all_or_none(inputs, cu):
        return inputs if all(x.requires_grad for x in inputs.values()) else detached(inputs)

    with_inputs(patch, all_or_none)


@caught_by("gated_deltanet-chunked-check_state_passing")
def initial_state_ignored(patch):
    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        return scan_reference(mechanism, inputs, cu_seqlens, zeros, sizes)

    on_chunked(patch, scan)


@caught_by("gated_deltanet-chunked-check_matches_reference")
def decay_is_exclusive(patch):
    def late(inputs, cu):
        shifted = torch.cat([inputs["g"][:1], inputs["g"][:-1]])
        return inputs | {"g": shifted}

    with_inputs(patch, late)


@caught_by("gated_deltanet-chunked-check_matches_reference")
def chunk_off_by_one(patch):
    in_chunks(patch, chunk=lambda start, end: (start, max(start, end - 1)))


@caught_by("gated_deltanet-chunked-check_matches_reference")
def last_partial_chunk_lost(patch):
    in_chunks(patch, chunk=lambda start, end: (start, end if end - start == 16 else start))


@caught_by("gated_deltanet-chunked-check_state_passing")
def state_not_carried_between_chunks(patch):
    in_chunks(patch, carried=lambda state, final: state)


@caught_by("gated_deltanet-chunked-check_gradients_match_reference")
def gradient_cut_between_chunks(patch):
    in_chunks(patch, carried=lambda state, final: detached(final))


@caught_by("gated_deltanet-chunked-check_matches_reference")
def beta_missing_in_the_erase_term(patch):
    def step(self, state, inputs):
        q, k, v, g, beta = take(inputs, "q k v g beta")
        S = state["S"] * g.exp()[..., None, None]
        S = S + outer(k, beta[..., None] * v - read(S, k))
        return {"S": S}, self.scale_for(q) * read(S, q)

    with_rule(patch, step=step)


@caught_by("gated_deltanet-chunked-check_matches_reference")
def erase_sees_the_state_before_decay(patch):
    def step(self, state, inputs):
        q, k, v, g, beta = take(inputs, "q k v g beta")
        S = state["S"] * g.exp()[..., None, None]
        S = S + outer(k, beta[..., None] * (v - read(state["S"], k)))
        return {"S": S}, self.scale_for(q) * read(S, q)

    with_rule(patch, step=step)


@caught_by("gated_deltanet-chunked-check_step_matches_scan")
def read_before_write(patch):
    def step(self, state, inputs):
        new, _ = GatedDeltaNet.step(self, state, inputs)
        return new, self.scale_for(inputs["q"]) * read(state["S"], inputs["q"])

    with_rule(patch, step=step)
    # a scan of one token is left as it was: the fault shows in longer ones
    wrong = BACKENDS["chunked"]
    patch.setitem(BACKENDS, "chunked", lambda *a: (scan_reference if len(a[1]["v"]) == 1 else wrong)(*a))


@caught_by("gated_deltanet-chunked-check_matches_reference")
def scale_dropped(patch):
    with_rule(patch, scale_for=lambda self, q: 1.0)


@caught_by("rwkv6-chunked-check_matches_reference")
def bonus_missing(patch):
    with_inputs(patch, lambda inputs, cu: inputs | {"u": torch.zeros_like(inputs["u"])})


@caught_by("gated_deltanet-reference-check_matches_reference")
def key_heads_interleaved(patch):
    def repeat(axes, tensor, sizes):
        names = axes.split()
        if "G" not in names:
            return tensor
        return torch.cat([tensor] * (sizes["H"] // sizes["G"]), dim=names.index("G") - len(names))

    patch.setattr("momkit.mechanisms.reference.repeat_key_heads", repeat)


@caught_by("gated_deltanet-chunked-check_causal")
def future_leaks_through_a_mean(patch):
    with_results(patch, lambda output, final, cu, state: (output + 1e-6 * output.mean(0), final))


@caught_by("gated_deltanet-reference-check_causal")
def future_multiplied_by_zero(patch):
    def leak(inputs, cu):
        return inputs | {"v": inputs["v"] + 0.0 * inputs["v"].sum(0)}

    with_inputs(patch, leak, "reference")


@caught_by("gated_deltanet-chunked-check_sequences_independent")
def state_leaks_into_the_next_segment(patch):
    with_results(patch, lambda output, final, cu, s: (output, {n: x + 1e-6 * x.roll(1, 0) for n, x in final.items()}))


@caught_by("gated_deltanet-chunked-check_matches_reference")
def cu_seqlens_off_by_one(patch):
    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        late = cu_seqlens.clone()
        late[1:-1] = torch.minimum(late[1:-1] + 1, cu_seqlens[-1])
        return scan_reference(mechanism, inputs, late, state, sizes)

    on_chunked(patch, scan)


@caught_by("gated_deltanet-chunked-check_sequence_order_equivariant")
def final_states_in_the_order_of_length(patch):
    def by_length(output, final, cu, state):
        order = cu.diff().argsort(descending=True)
        return output, {name: tensor[order] for name, tensor in final.items()}

    with_results(patch, by_length)


@caught_by("gated_deltanet-chunked-check_empty_segments")
def state_of_empty_segments_forgotten(patch):
    def forget(output, final, cu, state):
        filled = cu.diff() > 0
        return output, {name: tensor * filled.view(-1, 1, 1, 1) for name, tensor in final.items()}

    with_results(patch, forget)


@caught_by("gated_deltanet-chunked-check_uncovered_tail")
def tail_left_unwritten(patch):
    def unwritten(output, final, cu, state):
        written = torch.empty_like(output)
        end = int(cu[-1])
        return torch.cat([output[:end], written[end:]]), final

    with_results(patch, unwritten)


@caught_by("gated_deltanet-chunked-check_writes_every_output")
def last_token_of_long_segments_unwritten(patch):
    def unwritten(output, final, cu, state):
        if int(cu[-1]) < 3:
            return output, final
        return torch.cat([output[:-1], torch.empty_like(output[-1:])]), final

    with_results(patch, unwritten)


@caught_by("gated_deltanet-chunked-check_repeatable")
def sums_in_random_order(patch):
    def jitter(output, final, cu, state):
        return output * (1 + torch.randint(2, output.shape) * torch.finfo(output.dtype).eps), final

    with_results(patch, jitter)


@caught_by("gated_deltanet-chunked-check_extreme_gates")
def gates_clamped(patch):
    with_inputs(patch, lambda inputs, cu: inputs | {"g": inputs["g"].clamp_min(-5.0)})


@caught_by("gated_deltanet-chunked-check_extreme_gates")
def decays_as_differences_of_sums(patch):
    def difference(inputs, cu):
        total = torch.cat([torch.zeros_like(inputs["g"][:1]), inputs["g"].cumsum(0)])
        return inputs | {"g": total[1:] - total[:-1]}

    with_inputs(patch, difference)


@caught_by("gated_deltanet-chunked-check_gradients_at_extreme_gates")
def gradient_of_a_closed_gate_is_nan(patch):
    # exp(g) * 1 by logarithm and back: right forward, 0 * inf backward
    with_inputs(patch, lambda inputs, cu: inputs | {"g": inputs["g"].exp().log()})


@caught_by("gated_deltanet-chunked-check_leaves_arguments_alone")
def initial_state_overwritten(patch):
    def scan(mechanism, inputs, cu_seqlens, state, sizes):
        output, final = scan_reference(mechanism, inputs, cu_seqlens, state, sizes)
        for name, tensor in state.items():
            tensor.copy_(final[name])
        return output, final

    on_chunked(patch, scan)


@caught_by("gated_deltanet-chunked-check_shapes_and_dtypes")
def output_in_float32(patch):
    with_results(patch, lambda output, final, cu, state: (output.float(), final))


@caught_by("retention-chunked-check_frozen_tokens_leave_no_trace")
def rows_of_a_constant_ignored(patch):
    with_inputs(patch, lambda inputs, cu: inputs | {"g": inputs["g"][0] if inputs["g"].ndim == 2 else inputs["g"]})


@caught_by("gated_deltanet-reference-check_state_index")
def state_index_ignored(patch):
    check_state = scan_module.check_state

    def ignore(rule, sizes, n, state, index, device):
        return check_state(rule, sizes, n, state, None if index is None else torch.arange(n) % len(state["S"]), device)

    patch.setattr(scan_module, "check_state", ignore)


# rules: what a plugin's author gets wrong


class WrongSpec(GatedDeltaNetSpec):
    kind: Literal["wrong"] = "wrong"


class Wrong(GatedDeltaNet):
    """Forget, then correct what was there before.

    S = S

    arXiv 0000.00000.
    """

    Spec = WrongSpec


class LooseSpec(GatedDeltaNetSpec):
    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: Literal["wrong"] = "wrong"


@caught_by("wrong-check_spec_round_trips", Wrong)
def unknown_fields_taken(patch):
    patch.setattr(Wrong, "Spec", LooseSpec)


@caught_by("wrong-check_spec_round_trips", Wrong)
def fields_lost_on_the_way_to_json(patch):
    dump = WrongSpec.model_dump_json
    patch.setattr(WrongSpec, "model_dump_json", lambda self: dump(self, exclude={"num_heads"}))


@caught_by("wrong-check_documented", Wrong)
def docstring_without_a_paper(patch):
    patch.setattr(Wrong, "__doc__", "Forget, then correct what was there before.\n\nS = S")


@caught_by("wrong-check_structure_is_the_step", Wrong)
def structure_declares_another_erase(patch):
    patch.setattr(Wrong, "structure", Structure(decay="head", erase="delta", erase_sees="previous"))


@caught_by("wrong-check_prepare_matches_domain", Wrong)
def gate_above_zero(patch):
    def prepare(self, projected):
        inputs = GatedDeltaNet.prepare(self, projected)
        return inputs | {"g": inputs["g"] + projected["dt"]}

    patch.setattr(Wrong, "prepare", prepare)


@caught_by("wrong-check_prepare_matches_domain", Wrong)
def gate_in_half_precision(patch):
    def prepare(self, projected):
        inputs = GatedDeltaNet.prepare(self, projected)
        return inputs | {"g": inputs["g"].to(projected["v"].dtype)}

    patch.setattr(Wrong, "prepare", prepare)


@caught_by("wrong-check_prepare_matches_domain", Wrong)
def prepare_changes_its_argument(patch):
    def prepare(self, projected):
        projected["dt"].clamp_(max=0.0)
        return GatedDeltaNet.prepare(self, projected)

    patch.setattr(Wrong, "prepare", prepare)


@caught_by("wrong-check_sample_is_legal", Wrong)
def samples_explode(patch):
    def sample(self, generator, sizes):
        inputs = GatedDeltaNet.sample(self, generator, sizes)
        return inputs | {"k": 3 * inputs["k"]}

    patch.setattr(Wrong, "sample", sample)


@caught_by("gated_deltanet-check_freeze_keeps_state")
def freeze_by_multiplication(patch):
    def freeze(self, inputs, where):
        keep = (~where)[:, None]
        return inputs | {"g": inputs["g"] * keep, "beta": inputs["beta"] * keep}

    patch.setattr(GatedDeltaNet, "freeze", freeze)


@caught_by("gated_deltanet-check_freeze_keeps_state")
def freeze_forgets_the_write(patch):
    freeze = GatedDeltaNet.freeze
    patch.setattr(GatedDeltaNet, "freeze", lambda self, i, where: freeze(self, i, where) | {"beta": i["beta"]})


@caught_by("gated_deltanet-check_freeze_still_reads")
def freeze_silences_the_read(patch):
    freeze = GatedDeltaNet.freeze

    def silent(self, inputs, where):
        return freeze(self, inputs, where) | {"q": inputs["q"].masked_fill(where.view(-1, 1, 1), 0.0)}

    patch.setattr(GatedDeltaNet, "freeze", silent)


# dispatch: what order of slots, convolution and combine get wrong


def with_plan(patch: Patch, change) -> None:
    make_plan = dispatch.make_plan
    wrong = lambda *args, **kwargs: change(make_plan(*args, **kwargs))  # noqa: E731
    patch.setattr(dispatch, "make_plan", wrong)
    patch.setattr(block, "make_plan", wrong)


def backwards(plan):
    """The slots of each segment, last first, as an unstable sort may leave them."""
    order = (plan.segment * len(plan.segment) - torch.arange(len(plan.segment))).argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    writes = None if plan.writes is None else plan.writes[order]
    return replace(plan, slot_token=plan.slot_token[order], token_slot=place[plan.token_slot], writes=writes)


@caught_by("dispatch-check_time_order_kept_in_each_memory")
def unstable_order(patch):
    with_plan(patch, backwards)


@caught_by("gated_deltanet-block-check_definition")
def unstable_order_in_a_block(patch):
    with_plan(patch, backwards)


@caught_by("dispatch-check_segments_hold_their_tokens")
def segment_bounds_off_by_one(patch):
    with_plan(patch, lambda plan: replace(plan, cu_seqlens=(plan.cu_seqlens - 1).clamp_min(0)))


@caught_by("dispatch-check_plan_is_permutation")
def two_choices_share_a_slot(patch):
    with_plan(patch, lambda plan: replace(plan, token_slot=plan.token_slot[:, :1].expand_as(plan.token_slot)))


@caught_by("dispatch-check_masked_tokens_in_the_tail")
def mask_ignored_by_the_plan(patch):
    make_plan = dispatch.make_plan
    patch.setattr(dispatch, "make_plan", lambda routing, cu, mask, **sizes: make_plan(routing, cu, None, **sizes))


@caught_by("dispatch-check_writes_follow_their_slots")
def writes_left_in_the_order_of_time(patch):
    def unsorted(plan):
        return plan if plan.writes is None else replace(plan, writes=plan.writes[plan.token_slot].flatten())

    with_plan(patch, unsorted)


@caught_by("dispatch-check_combine")
def combine_in_another_order(patch):
    combine = ops.combine

    def reversed_order(slots, token_slot, weights, mask=None):
        if token_slot.shape[1] == weights.shape[1]:
            return combine(slots, token_slot.flip(1), weights.flip(1), mask)
        shared = torch.ones_like(weights[:, :1])
        return combine(slots, token_slot.flip(1), torch.cat([weights, shared], 1).flip(1), mask)

    patch.setattr(ops, "combine", reversed_order)


@caught_by("dispatch-check_combine")
def mask_by_multiplication(patch):
    combine = ops.combine
    patch.setattr(ops, "combine", lambda s, t, w, mask: combine(s, t, w) * mask[:, None, None])


@caught_by("dispatch-check_short_conv")
def read_only_slots_enter_the_history(patch):
    of = ops.Windows.of
    patch.setattr(ops.Windows, "of", staticmethod(lambda cu, segment, writes, width: of(cu, segment, None, width)))


@caught_by("dispatch-check_grouped_linear")
def memories_share_one_weight(patch):
    grouped = ops.grouped_linear
    patch.setattr(ops, "grouped_linear", lambda x, w, offsets: grouped(x, w[:1].expand_as(w), offsets))


# blocks: what is wrong between the parts


@caught_by("gated_deltanet-block-check_causal")
def conv_leaks_over_segments(patch):
    short_conv = ops.short_conv

    def leaky(x, weight, bias, history, windows):
        _, new_history = short_conv(x, weight, bias, history, windows)
        padded = torch.nn.functional.pad(x.T[None], (weight.shape[1] - 1, 0))
        return torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight))[0].T, new_history

    patch.setattr(projection, "short_conv", leaky)


@caught_by("gated_deltanet-block-check_split_invariance")
def stale_conv_history(patch):
    short_conv = ops.short_conv
    patch.setattr(
        projection, "short_conv", lambda x, w, b, history, win: (short_conv(x, w, b, history, win)[0], history)
    )


@caught_by("gated_deltanet-block-check_split_invariance")
def cut_loses_the_conv_history(patch):
    short_conv = ops.short_conv
    patch.setattr(projection, "short_conv", lambda x, w, b, h, win: short_conv(x, w, b, torch.zeros_like(h), win))


@caught_by("gated_deltanet-block-check_definition")
def shared_memory_missing(patch):
    combine = ops.combine

    def without_shared(slots, token_slot, weights, mask=None):
        return combine(slots, token_slot[:, : weights.shape[1]], weights, mask)

    patch.setattr(ops, "combine", without_shared)


@caught_by("gated_deltanet-block-check_definition")
def weights_of_other_choices(patch):
    combine = ops.combine
    patch.setattr(ops, "combine", lambda s, t, w, mask=None: combine(s, t, w.flip(1), mask))


@caught_by("gated_deltanet-block-check_definition")
def weights_without_gradient(patch):
    def update(self, x, *rest):
        return real_update(self, x.detach(), *rest)

    real_update = block.MoMBlock.update
    patch.setattr(block.MoMBlock, "update", update)


@caught_by("gated_deltanet-block-check_one_memory_is_the_bare_rule")
def norm_over_all_heads_at_once(patch):
    norm = ops.gated_rms_norm

    def over_heads(x, weight, gate, eps):
        flat = norm(x.flatten(1), weight.new_ones(()), None, eps).view_as(x) * weight
        return flat * torch.nn.functional.silu(gate)

    patch.setattr(ops, "gated_rms_norm", over_heads)


@caught_by("gated_deltanet-block-check_every_parameter_gets_a_gradient")
def output_gate_never_used(patch):
    norm = ops.gated_rms_norm
    patch.setattr(ops, "gated_rms_norm", lambda x, weight, gate, eps: norm(x, weight, None, eps))


@caught_by("gated_deltanet-block-check_mask")
def mask_ignored(patch):
    make_plan = dispatch.make_plan
    patch.setattr(block, "make_plan", lambda routing, cu, mask, **sizes: make_plan(routing, cu, None, **sizes))


@caught_by("gated_deltanet-block-check_unrouted_memories_unchanged")
def unrouted_memories_decay(patch):
    def decaying(*args, **kwargs):
        out = scan_module.run(*args, **kwargs)
        return replace(out, final_state={name: tensor * 0.999 for name, tensor in out.final_state.items()})

    patch.setattr(block, "run", decaying)


@caught_by("gated_deltanet-block-check_unrouted_memories_unchanged")
def read_only_slots_write(patch):
    patch.setattr(GatedDeltaNet, "freeze", lambda self, inputs, where: inputs)


@caught_by("gated_deltanet-block-check_sequences_isolated")
def sequences_share_a_state(patch):
    def mixing(*args, initial_state, **kwargs):
        out = scan_module.run(*args, initial_state=initial_state, **kwargs)
        return replace(out, output=out.output + 1e-6 * out.output.mean(0))

    patch.setattr(block, "run", mixing)


@caught_by("gated_deltanet-block-check_packing_padding_loop")
def states_laid_out_sequence_first(patch):
    def flat(tensor, num_groups):
        return tensor.view(len(tensor) // num_groups, num_groups, *tensor.shape[1:])

    patch.setattr(block, "batch_first", flat)


@caught_by("gated_deltanet-block-check_state_never_mutated")
def forward_updates_the_state_in_place(patch):
    def in_place(*args, initial_state, **kwargs):
        out = scan_module.run(*args, initial_state=initial_state, **kwargs)
        for name, tensor in initial_state.items():
            tensor.copy_(out.final_state[name])
        return out

    patch.setattr(block, "memory_major", lambda tensor: tensor.view(-1, *tensor.shape[2:]))
    patch.setattr(block, "run", in_place)


@caught_by("gated_deltanet-block-check_step_touches_only_its_slots")
def step_writes_to_the_row_of_another_memory(patch):
    make_step_plan = dispatch.make_step_plan

    def wrong_rows(memory_ids, writes, num_groups):
        plan = make_step_plan(memory_ids, writes, num_groups)
        return replace(plan, memory=(plan.memory + 1) % num_groups)

    patch.setattr(block, "make_step_plan", wrong_rows)


@caught_by("gated_deltanet-block-check_decode_is_scan")
def step_lets_every_slot_write(patch):
    passes = block.passes
    patch.setattr(block, "passes", lambda *args: [(columns, None, shared) for columns, _, shared in passes(*args)])


@caught_by("gated_deltanet-block-check_train_is_eval")
def training_differs_from_evaluation(patch):
    output = block.MoMBlock.output
    patch.setattr(block.MoMBlock, "output", lambda self, *a: output(self, *a) * (1.001 if self.training else 1.0))


@caught_by("gated_deltanet-block-check_beams")
def reorder_forgets_the_conv_history(patch):
    def reorder(self, index):
        for tensor in self.recurrent.values():
            tensor.copy_(tensor.index_select(0, index))

    patch.setattr(MoMState, "reorder", reorder)


@caught_by("gated_deltanet-block-check_repeatable_and_written")
def combine_leaves_tokens_unwritten(patch):
    combine = ops.combine

    def unwritten(slots, token_slot, weights, mask=None):
        mixed = combine(slots, token_slot, weights, mask)
        return torch.cat([mixed[:-1], torch.empty_like(mixed[-1:])])

    patch.setattr(ops, "combine", unwritten)


# routers


@caught_by("softmax_topk-check_weights_normalised")
def weights_not_renormalised(patch):
    def kept(logits, top_k):
        ids = logits.topk(top_k, dim=-1).indices
        return logits.softmax(-1).gather(1, ids), ids

    patch.setattr(softmax_topk, "top_k_softmax", kept)


@caught_by("softmax_topk-check_weights_normalised")
def probabilities_underflow(patch):
    def tiny(logits, top_k):
        # renormalised after the fact: where all but the first underflow the others' ids, and a zero sum, are chance
        p = (logits - 800).exp()
        top, ids = p.topk(top_k, dim=-1)
        return top / top.sum(-1, keepdim=True), ids

    patch.setattr(softmax_topk, "top_k_softmax", tiny)


@caught_by("softmax_topk-check_ids_distinct_and_in_range")
def one_memory_chosen_twice(patch):
    top_k_softmax = softmax_topk.top_k_softmax

    def twice(logits, top_k):
        weights, ids = top_k_softmax(logits, top_k)
        return weights, ids[:, :1].expand_as(ids)

    patch.setattr(softmax_topk, "top_k_softmax", twice)


@caught_by("softmax_topk-check_causal")
def router_centres_its_logits_over_the_batch(patch):
    router_logits = softmax_topk.router_logits

    def centred(x, weight):
        logits = router_logits(x, weight)
        return logits - logits.mean(0)

    patch.setattr(softmax_topk, "router_logits", centred)


@caught_by("softmax_topk-check_shapes_and_dtypes")
def logits_in_half_precision(patch):
    patch.setattr(softmax_topk, "router_logits", lambda x, weight: x @ weight.T)


@caught_by("softmax_topk-check_aux_loss_is_masked")
def aux_loss_ignores_the_mask(patch):
    loss = softmax_topk.load_balance_loss
    patch.setattr(softmax_topk, "load_balance_loss", lambda probs, ids, mask: loss(probs, ids))


@caught_by("softmax_topk-block-check_packing_padding_loop")
def aux_loss_counts_padding(patch):
    loss = softmax_topk.load_balance_loss
    patch.setattr(softmax_topk, "load_balance_loss", lambda probs, ids, mask: loss(probs, ids))


@caught_by("sigmoid_topk-check_update")
def update_raises_the_bias_of_crowded_memories(patch):
    update = SigmoidTopK.update
    patch.setattr(SigmoidTopK, "update", lambda self, load: update(self, -load))


@caught_by("sigmoid_topk-check_route_changes_nothing")
def forward_updates_the_bias(patch):
    route = SigmoidTopK.route

    def updating(self, x, mask=None):
        routing = route(self, x, mask)
        self.update(torch.bincount(routing.memory_ids.flatten(), minlength=len(self.bias)))
        return routing

    patch.setattr(SigmoidTopK, "route", updating)


def find(fault: Fault):
    """The check that is to catch a fault, on a subject made anew."""
    (check,) = [
        bound for bound, _ in bound_checks([fault.target or fault.check.partition("-")[0]]) if bound.id == fault.check
    ]
    return check


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_caught(fault, monkeypatch):
    monkeypatch.setenv("MOMKIT_PROFILE", "mutants")
    find(fault)()  # a check that fails anyway would prove nothing
    fault.seed(monkeypatch)
    with pytest.raises(AssertionError):
        find(fault)()
