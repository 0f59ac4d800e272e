"""Tests of the tests: faults are seeded into kernels, one at a time, and the named check must catch each.

A fault is one line of a kernel file and what stands there instead. `TRITON_INTERPRET=1 pytest`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from momkit.kernels.available import interpreting
from momkit.registry import find_mechanism
from momkit.testing.gradient_checks import assert_true_gradients
from momkit.testing.poison import poisoned_empty
from momkit.testing.scan_checks import assert_true_to_step
from momkit.testing.strategies import ScanCase
from momkit.testing.subjects import ScanSubject
from momkit.testing.suite import bound_checks

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import (
    delta,
    delta_backward,
    delta_chain,
    delta_forward,
    delta_gradients,
    delta_inverse,
    gates,
    layout,
    scalar_decay,
    scalar_kernels,
    selective_kernels,
    selective_scan,
    tiles,
)

Catch = Callable[[], None]


@cache
def conformance(name: str) -> Catch:
    """The check of the conformance kit with this name: `mamba2-causal`."""
    rule, _, check = name.partition("-")
    ids = (f"{rule}-triton-check_{check}", f"{rule}-decode-triton-check_{check}")
    return next(bound for bound, _ in bound_checks([rule], backend="triton") if bound.id in ids)


def assert_true(name: str, lengths: tuple[int, ...], varying: str = "", **sizes: int) -> None:
    """Results of a rule's kernels, and their gradients, where the few cases of the conformance kit don't reach.

    varying: constants that get a row for each token.
    """
    cls = find_mechanism(name)
    subject = ScanSubject(name, cls, cls.Spec(), "triton")
    defaults = {"H": 1, "G": 1, "K": 3, "V": 5, "channels": 10, "N": 3}
    case = ScanCase(subject.rule, defaults | sizes, lengths, seed=0, dtype=torch.float32)
    factors = torch.rand(case.num_tokens, generator=torch.Generator().manual_seed(1))
    for constant in varying.split():
        case.inputs[constant] = factors.view(-1, *[1] * case.inputs[constant].ndim) * case.inputs[constant]
    assert_true_to_step(subject, case)
    assert_true_gradients(subject, case)


def scalar_scan() -> None:
    assert_true("mamba2", (70, 0, 3), H=4, G=2)


def delta_scan() -> None:
    assert_true("gated_deltanet", (40, 0, 3), H=4, G=2)


def in_short_pieces(name: str, **sizes: int) -> None:
    """Segments split in three pieces, the middle one between two others, and in two."""
    with pytest.MonkeyPatch.context() as patch:
        for family in (scalar_decay, delta, selective_scan):
            patch.setattr(family, "SHORTEST_PIECE", 64)
            patch.setattr(family, "multiprocessors", lambda device: 1 << 20)
        assert_true(name, (140, 70), **sizes)


def scalar_scan_in_pieces() -> None:
    in_short_pieces("mamba2")


def delta_scan_in_pieces() -> None:
    # with few keys, or gates, nothing lasts from one end of a piece to the other
    in_short_pieces("deltanet", K=24)


def selective_scan_of_many_channels() -> None:
    # more than one tile of channels, and blocks of tokens
    assert_true("mamba", (20, 0, 3))


def selective_scan_with_constants_that_vary() -> None:
    assert_true("mamba", (20, 3), varying="A D")


def selective_scan_in_pieces() -> None:
    in_short_pieces("mamba", channels=2)


@dataclass(frozen=True)
class Fault:
    """caught_by: a rule and a check of the conformance kit, or a test where the kit's few cases don't reach."""

    name: str
    module: ModuleType
    line: str
    instead: str
    caught_by: str | Catch


FAULTS = [
    # what both families share
    Fault(
        "decay_without_the_tokens_own_gate",
        gates,
        "wide = tl.cumsum(gates.to(tl.float64) * LOG2_E, 0)",
        "wide = tl.cumsum(gates.to(tl.float64) * LOG2_E, 0) - gates.to(tl.float64) * LOG2_E",
        "mamba2-matches_reference",
    ),
    Fault(
        "endless_gates_not_clamped",
        gates,
        "gates = tl.maximum(gates, least, propagate_nan=tl.PropagateNan.ALL)",
        "gates = gates",
        "mamba2-extreme_gates",
    ),
    Fault(
        "pairs_masked_after_the_exponential",
        gates,
        'return tl.exp2(tl.where(seen, span, float("-inf")))',
        "return tl.exp2(span) * tl.where(seen, 1.0, 0.0)",
        "mamba2-extreme_gates",
    ),
    Fault(
        "sums_of_gates_rounded_to_float32",
        gates,
        "span += low[:, None] - low[None, :]",
        "span += 0.0",
        "mamba2-extreme_gates",
    ),
    Fault(
        "uncovered_rows_in_no_piece",
        layout,
        "tl.where(n == segments - 1, T, tl.maximum(end, begin))",
        "tl.maximum(end, begin)",
        "mamba2-uncovered_tail",
    ),
    Fault(
        "pieces_end_one_token_early",
        layout,
        "tl.minimum(start_token + length, end)",
        "tl.minimum(start_token + length, end - 1)",
        "mamba2-matches_reference",
    ),
    Fault(
        "gradient_of_one_head_of_a_group",
        tiles,
        "K).sum(2)",
        "K)[:, :, 0]",
        scalar_scan,
    ),
    # the scalar family
    Fault(
        "token_does_not_read_its_own_write",
        scalar_kernels,
        "between *= pair_decay(high, low, REVERSE, False, LOW)",
        "between *= pair_decay(high, low, REVERSE, True, LOW)",
        "mamba2-matches_reference",
    ),
    Fault(
        "last_chunk_lost_unless_full",
        scalar_kernels,
        "steps = tl.cdiv(end - begin, C)\n",
        "steps = (end - begin) // C\n",
        "mamba2-matches_reference",
    ),
    Fault(
        "state_not_decayed_between_chunks",
        scalar_kernels,
        "S *= tl.exp2(total)",
        "S *= 1.0",
        "mamba2-matches_reference",
    ),
    Fault(
        "initial_state_ignored",
        scalar_kernels,
        "S = tl.load(source + spot, mask=inside, other=0.0)\n",
        "S = tl.load(source + spot, mask=inside & (enters == 0), other=0.0)\n",
        "mamba2-matches_reference",
    ),
    Fault(
        "gradient_of_the_final_state_lost",
        scalar_kernels,
        "S = tl.load(source + spot, mask=inside, other=0.0)\n",
        "S = tl.load(source + spot, mask=inside & (enters == 0 if REVERSE else True), other=0.0)\n",
        "mamba2-gradients_match_reference",
    ),
    Fault(
        "no_final_state_of_an_empty_segment",
        scalar_kernels,
        "if leaves:\n            tl.store(last",
        "if leaves & (begin < end):\n            tl.store(last",
        "mamba2-empty_segments",
    ),
    Fault(
        "uncovered_rows_not_written",
        scalar_kernels,
        "cols[None, :], 0.0, mask=mask)",
        "cols[None, :], 0.0, mask=mask & False)",
        "mamba2-uncovered_tail",
    ),
    Fault(
        "gates_of_uncovered_rows_not_written",
        scalar_kernels,
        "tl.store(target, 0.0, mask=live)",
        "tl.store(target, 0.0, mask=live & False)",
        "mamba2-uncovered_tail",
    ),
    Fault(
        "gate_gradient_without_what_enters_the_window",
        scalar_kernels,
        "tl.where(cuts > 0, 0.0, entering[:, None])",
        "tl.where(cuts > 0, 0.0, 0.0 * entering[:, None])",
        scalar_scan,
    ),
    Fault(
        "windows_of_two_segments_share_a_slot",
        scalar_kernels,
        "return at // LENGTH + segment",
        "return at // LENGTH",
        scalar_scan,
    ),
    Fault(
        "what_leaves_a_window_forgotten",
        scalar_kernels,
        "leaving += tl.load(source + H,",
        "leaving += 0.0 * tl.load(source + H,",
        scalar_scan_in_pieces,
    ),
    Fault(
        "what_leaves_a_segment_taken_for_nothing",
        scalar_kernels,
        "            if FINAL:\n",
        "            if FINAL and False:\n",
        scalar_scan,
    ),
    Fault(
        "what_a_token_reads_of_itself_counted_in_gates",
        scalar_kernels,
        "term = tl.sum(b_out * b_w.to(tl.float32), 1)",
        "term = tl.sum((b_out + of_itself[:, None] * b_z.to(tl.float32)) * b_w.to(tl.float32), 1) * (1 + REVERSE)",
        scalar_scan,
    ),
    Fault(
        "heads_share_keys_in_turn",
        scalar_kernels,
        "b_y = load_tile(y + base * (H // RY * K) + h // RY * K,",
        "b_y = load_tile(y + base * (H // RY * K) + h % (H // RY) * K,",
        scalar_scan,
    ),
    Fault(
        "chain_of_pieces_without_decay",
        scalar_kernels,
        "S = S * tl.load(decays + at.to(tl.int64) * H + h) + added",
        "S = S + added",
        scalar_scan_in_pieces,
    ),
    # the delta family
    Fault(
        "strength_missing_in_the_erase",
        delta_inverse,
        "unit_lower_inverse(pairs * strength[None, :], PRECISION)",
        "unit_lower_inverse(pairs, PRECISION)",
        "gated_deltanet-matches_reference",
    ),
    Fault(
        "inverse_of_large_blocks_not_merged",
        delta_inverse,
        "if (1 << level) < C:",
        "if (1 << level) < C // 2:",
        "deltanet-matches_reference",
    ),
    Fault(
        "chunk_ends_one_token_early",
        delta_forward,
        "seen = token < length - first\n",
        "seen = token < length - first - 1\n",
        "gated_deltanet-matches_reference",
    ),
    Fault(
        "erase_sees_the_state_before_its_decay",
        delta_forward,
        "wanted *= from_start[:, None]",
        "wanted *= 1.0",
        "gated_deltanet-matches_reference",
    ),
    Fault(
        "initial_delta_state_ignored",
        delta_forward,
        "S += tl.load(initial_state + whole_state + state_tile, mask=state_inside & (index == 0), other=0.0)",
        "S += 0.0",
        "gated_deltanet-matches_reference",
    ),
    Fault(
        "no_final_state_of_an_empty_delta_segment",
        delta_forward,
        "if READ and last:",
        "if READ and last and begin < end:",
        delta_scan,
    ),
    Fault(
        "delta_heads_share_keys_in_turn",
        delta_forward,
        "keys = at * (G * K) + full_head // (H // G) * K",
        "keys = at * (G * K) + full_head % G * K",
        delta_scan,
    ),
    Fault(
        "gradient_of_the_final_delta_state_lost",
        delta_backward,
        "D += tl.load(d_final + whole_state + state_tile, mask=state_inside & (follows == 0), other=0.0)",
        "D += 0.0",
        delta_scan,
    ),
    Fault(
        "gate_gradient_of_all_that_tokens_receive",
        delta_gradients,
        "d_gate = tl.sum(tl.where(later, crossing, 0.0), 0)",
        "d_gate = tl.sum(crossing, 0)",
        delta_scan,
    ),
    Fault(
        "gate_gradient_without_the_state_that_stays",
        delta_gradients,
        "+ whole * tl.sum(",
        "+ 0.0 * tl.sum(",
        delta_scan,
    ),
    Fault(
        "chain_of_pieces_without_moves",
        delta_chain,
        "arrived += tl.dot(m, part, input_precision=PRECISION)",
        "arrived += 0.0",
        delta_scan_in_pieces,
    ),
    # Mamba
    Fault(
        "step_decays_to_another_base",
        selective_kernels,
        "return tl.load(A + spot, mask=inside, other=0.0) * LOG2_E",
        "return tl.load(A + spot, mask=inside, other=0.0)",
        "mamba-matches_reference",
    ),
    Fault(
        "decoding_decays_by_the_rate_of_other_channels",
        selective_kernels,
        "return tl.load(A + spot, mask=inside, other=0.0) * LOG2_E",
        "return tl.load(A + spot, mask=inside & (spot > 0), other=0.0) * LOG2_E",
        "mamba-decode_matches_step",
    ),
    Fault(
        "output_without_what_passes_the_state",
        selective_kernels,
        "outs += (tl.sum(h * C_t[None, :], 1) + skip * xs[t],)",
        "outs += (tl.sum(h * C_t[None, :], 1),)",
        "mamba-matches_reference",
    ),
    Fault(
        "step_size_missing_in_the_write",
        selective_kernels,
        "h = decay * h + (dts[t] * xs[t])[:, None] * B_t[None, :]\n            if ONLY",
        "h = decay * h + xs[t][:, None] * B_t[None, :]\n            if ONLY",
        "mamba-matches_reference",
    ),
    Fault(
        "rows_past_the_last_block_of_tokens_not_written",
        selective_kernels,
        "outs, live, cols, CHANNELS, False)",
        "outs, live // 8 * 8, cols, CHANNELS, False)",
        "mamba-matches_reference",
    ),
    Fault(
        "uncovered_channels_not_written",
        selective_kernels,
        "cols[:, None], 0.0, mask=mask)",
        "cols[:, None], 0.0, mask=mask & False)",
        "mamba-uncovered_tail",
    ),
    Fault(
        "no_final_state_of_an_empty_selective_segment",
        selective_kernels,
        "    elif leaves:\n",
        "    elif leaves & (begin < end):\n",
        "mamba-empty_segments",
    ),
    Fault(
        "initial_selective_state_ignored",
        selective_kernels,
        "CHANNELS * N) + spot, mask=inside, other=0.0)\n    at",
        "CHANNELS * N) + spot, mask=inside & False, other=0.0)\n    at",
        "mamba-matches_reference",
    ),
    Fault(
        "gradient_of_the_final_selective_state_lost",
        selective_kernels,
        "CHANNELS * N) + spot, mask=inside, other=0.0)\n    at",
        "CHANNELS * N) + spot, mask=inside & (not REVERSE), other=0.0)\n    at",
        "mamba-gradients_match_reference",
    ),
    Fault(
        "chain_of_selective_pieces_without_decay",
        selective_kernels,
        "h = h * tl.exp2(span * rate) + added",
        "h = h + added",
        selective_scan_in_pieces,
    ),
    Fault(
        "chain_of_selective_pieces_without_what_they_add",
        selective_kernels,
        "h = h * tl.exp2(span * rate) + added",
        "h = h * tl.exp2(span * rate)",
        selective_scan_in_pieces,
    ),
    Fault(
        "piece_in_reverse_adds_before_its_decay",
        selective_kernels,
        "h = decay * (h + xs[t][:, None] * B_t[None, :])",
        "h = decay * h + xs[t][:, None] * B_t[None, :]",
        selective_scan_in_pieces,
    ),
    Fault(
        "states_kept_after_a_block",
        selective_kernels,
        "target = kept + slot_of(at, segment, TOKENS)",
        "target = kept + slot_of(tl.maximum(at - TOKENS, begin), segment, TOKENS)",
        selective_scan_of_many_channels,
    ),
    Fault(
        "gradient_of_a_step_without_its_decay",
        selective_kernels,
        "d_dts += (x_t * of_write + tl.sum(of_decay * rate, 1) * LN_2,)",
        "d_dts += (x_t * of_write,)",
        "mamba-gradients_match_reference",
    ),
    Fault(
        "gradient_of_the_state_not_decayed",
        selective_kernels,
        "dh = tl.exp2(dt_t[:, None] * rate) * dh",
        "dh = 1.0 * dh",
        "mamba-gradients_match_reference",
    ),
    Fault(
        "gradient_of_writes_by_the_last_tile_only",
        selective_kernels,
        "more_wrote += (wrote[n] + ",
        "more_wrote += (0.0 * wrote[n] + ",
        selective_scan_of_many_channels,
    ),
    Fault(
        "gradient_of_rates_by_the_first_block_only",
        selective_kernels,
        "other=0.0) + d_rate, mask=inside)",
        "other=0.0) * 0.0 + d_rate, mask=inside)",
        selective_scan_of_many_channels,
    ),
    Fault(
        "rates_of_the_first_token_of_a_block",
        selective_kernels,
        "rate, skip = load_rate(A + (base + t) *",
        "rate, skip = load_rate(A + base *",
        selective_scan_with_constants_that_vary,
    ),
    Fault(
        "gradient_of_varying_rates_without_the_step",
        selective_kernels,
        "tl.store(dA + own_rate + spot, dt_t[:, None] * of_decay,",
        "tl.store(dA + own_rate + spot, of_decay,",
        selective_scan_with_constants_that_vary,
    ),
    Fault(
        "gradient_of_varying_skips_in_order_of_time",
        selective_kernels,
        "store_block(dD + base * CHANNELS, d_skips, live, cols, CHANNELS, True)",
        "store_block(dD + base * CHANNELS, d_skips, live, cols, CHANNELS, False)",
        selective_scan_with_constants_that_vary,
    ),
]


def plant(fault: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Load the fault's file with the one line changed, and let all other kernel files use what is in it."""
    text = Path(fault.module.__file__).read_text()
    assert text.count(fault.line) == 1, f"{fault.line!r} must be in {fault.module.__name__} once"
    # in a file, since the interpreter reads the source of a kernel from there
    path = folder / f"{fault.name}.py"
    path.write_text(text.replace(fault.line, fault.instead))
    spec = spec_from_file_location(fault.name, path)
    faulty = module_from_spec(spec)
    spec.loader.exec_module(faulty)
    sound = dict(vars(fault.module))
    made_anew = {name: x for name, x in vars(faulty).items() if name[:2] != "__" and x is not sound[name]}
    users = [user for name, user in sys.modules.items() if name.startswith("momkit.kernels.")]
    for user in users:
        for name, x in made_anew.items():
            if vars(user).get(name) is sound[name]:
                patch.setattr(user, name, x)


@cache
def assert_passes(caught_by: str | Catch) -> Catch:
    """What is to catch faults, once it has passed: what fails anyway would prove nothing."""
    catch = poisoned(conformance(caught_by) if isinstance(caught_by, str) else caught_by)
    catch()
    return catch


def poisoned(catch: Catch) -> Catch:
    """What is never written is NaN, and not by chance what it was to be."""

    def run() -> None:
        with poisoned_empty():
            catch()

    return run


# what overflows, and says so, is to be caught by its results
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_caught(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("MOMKIT_PROFILE", "interpret")
    catch = assert_passes(fault.caught_by)
    plant(fault, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        catch()
