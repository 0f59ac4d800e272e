"""The Mixture-of-Memories block: route, dispatch, project, scan, combine, output.

Letters: B sequences, T tokens, D hidden size, M memories, J slots a token, R slots, N segments, H heads, V value dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momkit.checks import FLOATS, check_finite, check_routing
from momkit.decode import check_state_index, choose_decode_backend, run_decode, write_rows
from momkit.errors import InputError
from momkit.kernels.available import why_no_kernels
from momkit.mechanisms.base import Context, Inputs, Mechanism, State
from momkit.ops import combine_norm, on_kernels
from momkit.projection import Projections
from momkit.registry import find_mechanism, find_router
from momkit.routing.base import RouterContext, Routing
from momkit.routing.dispatch import DispatchPlan, choices, make_plan, make_step_plan
from momkit.scan import Backend, BackendChoice, choose_backend, run
from momkit.spec import MoMSpec
from momkit.state import MoMState
from momkit.tokens import Tokens, check_hidden_states


@dataclass(frozen=True)
class MoMOutput:
    """hidden_states: as x. state: of every sequence, after its last token. aux_loss: scalar. routing: the choices."""

    hidden_states: Tensor
    state: MoMState
    aux_loss: Tensor
    routing: Routing


class MoMBlock(nn.Module):
    """A sequence layer with several memories, of which each token writes to and reads from a few.

    S^m_t = rule(S^m_{t-1}, x_t) for the chosen m;  y_t = W_o (norm(sum_m w^m_t o^m_t + o^shared_t) * silu(W_g x_t))

    Du et al. 2025, arXiv 2502.13685.
    """

    def __init__(self, spec: MoMSpec, *, layer_index: int = 0, num_layers: int = 1, backend: Backend = "auto") -> None:
        super().__init__()
        if not isinstance(spec, MoMSpec):
            raise InputError(f"spec must be a MoMSpec, got {type(spec).__name__}")
        self.spec = spec
        self.backend: Backend = backend
        D = spec.hidden_size
        self.num_groups = spec.num_memories + spec.shared_memory
        self.shared_id = spec.num_memories if spec.shared_memory else None
        self.mechanism = find_mechanism(spec.mechanism.kind)(spec.mechanism, Context(D, layer_index, num_layers))
        self.router = find_router(spec.router.kind)(spec.router, RouterContext(D, spec.num_memories, layer_index))
        self.project = Projections(self.mechanism.projections(), D, self.num_groups, spec.conv_size)
        self.output_shape = self.mechanism.output_spec()
        width = self.output_shape[0] * self.output_shape[1]
        self.norm_weight = nn.Parameter(torch.ones(self.output_shape[1]))
        self.gate_proj = nn.Linear(D, width, bias=False) if spec.output_gate else None
        self.out_proj = nn.Linear(width, D, bias=False)
        choose_backend(self.mechanism, backend)

    def forward(
        self, x: Tensor, state: MoMState | None = None, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> MoMOutput:
        """Run over whole sequences.

        x: `[B, T, D]`, or packed `[T, D]`. cu_seqlens: `[B + 1]` bounds of packed sequences. mask: as x without D,
        False at padding, left or right. state: what to start from; it is never changed. Raises InputError.
        """
        tokens = Tokens.of(x, cu_seqlens, mask, self.spec.hidden_size)
        self.check_dtype(x)
        num_sequences = len(tokens.cu_seqlens) - 1
        if state is not None:
            self.check_state(state, num_sequences)
        routing = self.route(tokens.x, tokens.mask)
        plan = make_plan(
            routing,
            tokens.cu_seqlens,
            tokens.mask,
            num_memories=self.spec.num_memories,
            shared_memory=self.spec.shared_memory,
        )
        recurrent: State | None = None
        if state is None and type(self.mechanism).initial_state is Mechanism.initial_state:
            # a scan that starts from zeros reads no states
            history = self.project.empty_history(num_sequences * self.num_groups)
        else:
            state = self.initial_state(num_sequences) if state is None else state
            recurrent = {name: memory_major(tensor) for name, tensor in state.recurrent.items()}
            history = {name: memory_major(tensor) for name, tensor in state.conv.items()}
        slots, recurrent, history = self.update(tokens.x, plan, recurrent, history, self.backend)
        y = tokens.restore(self.output(slots, plan.token_slot, routing.weights, tokens.mask, tokens.x))
        new_state = MoMState(
            {name: batch_first(tensor, self.num_groups) for name, tensor in recurrent.items()},
            {name: batch_first(tensor, self.num_groups) for name, tensor in history.items()},
        )
        return MoMOutput(y, new_state, routing.aux_loss, routing)

    @torch.no_grad()
    def step(self, x: Tensor, state: MoMState, state_index: Tensor | None = None) -> MoMOutput:
        """Decode one token of each row, `x` `[B, D]`; only the memories of its slots change, in place.

        state_index: `[B]` int32 or int64, distinct: which sequence of a larger state each row goes on with; -1 is a
        padding row: its output is zeros, it changes nothing, and aux_loss leaves it out. None: row b is sequence b.
        A router that separates writing from reading takes one pass a choice, so that reads see the token's own writes.
        Raises InputError.
        """
        check_hidden_states(x, self.spec.hidden_size)
        if x.ndim != 2:
            raise InputError(f"x has shape {tuple(x.shape)}; allowed: [B, D]")
        self.check_dtype(x)
        self.check_state(state, len(x) if state_index is None else None)
        if state_index is not None:
            check_state_index(state_index, len(x), state.batch_size, x.device)
        state.cut()
        live = None if state_index is None else state_index >= 0
        if live is not None:
            x = torch.where(live[:, None], x, 0.0)
        routing = self.route(x, live)
        take_step = self.step_fused if on_kernels(x) else self.step_slots
        taken, gate = take_step(x, routing, state, state_index)
        y = self.output(*join_passes(taken), routing.weights, live, x, gate)
        return MoMOutput(y, state, routing.aux_loss, routing)

    def step_slots(
        self, x: Tensor, routing: Routing, state: MoMState, state_index: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], None]:
        """One token of each row in its memories: of each pass the outputs of slots, and the slots of rows; no gate."""
        memory_ids, _ = choices(routing, self.spec.num_memories, self.spec.shared_memory)
        taken = []
        for columns, writes, _ in passes(routing, self.shared_id):
            plan = make_step_plan(memory_ids[:, columns], writes, self.num_groups)
            sequence, live = plan.slot_token, None
            if state_index is not None:
                sequence = state_index.long().index_select(0, sequence)
                live = sequence >= 0
            rows = (sequence.clamp_min(0), plan.memory)
            output, recurrent, history = self.update(
                x,
                plan,
                {name: tensor[rows] for name, tensor in state.recurrent.items()},
                {name: tensor[rows] for name, tensor in state.conv.items()},
                "reference",
            )
            for part, new in ((state.recurrent, recurrent), (state.conv, history)):
                for name, tensor in part.items():
                    write_rows(tensor, rows, new[name].to(tensor.dtype), live)
            taken.append((output, plan.token_slot))
        return taken, None

    def step_fused(
        self, x: Tensor, routing: Routing, state: MoMState, state_index: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """The same in a handful of kernels, on states where they lie, and the gate: it is one of the linear maps."""
        beside = [] if self.gate_proj is None else [self.gate_proj.weight]
        values, products = self.project.step_linear(x, routing.memory_ids, self.shared_id, beside)
        # a forward pass leaves states memory by memory
        tensors = [*state.recurrent.values(), *state.conv.values()]
        by_memory = all(tensor.transpose(0, 1).is_contiguous() for tensor in tensors)
        strides = (1, state.batch_size) if by_memory else (self.num_groups, 1)
        flat = memory_major if by_memory else batch_major
        pool, history = ({n: flat(tensor) for n, tensor in part.items()} for part in (state.recurrent, state.conv))
        taken = []
        for columns, writes, shared_id in passes(routing, self.shared_id):
            projected, rows, token_slot = self.project.step(
                {name: value if value.ndim == 2 else value[:, columns] for name, value in values.items()},
                history, routing.memory_ids[:, columns], shared_id, writes, state_index, *strides,
            )  # fmt: skip
            inputs = self.mechanism.prepare(projected)
            if writes is not None:
                inputs = self.mechanism.freeze(inputs, ~writes.flatten())
            output = run_decode(self.mechanism, inputs, pool, rows)
            output = self.mechanism.finish(output, inputs, projected)
            taken.append((output.view(-1, *self.output_shape), token_slot))
        for tensor, changed in zip(tensors, (*pool.values(), *history.values()), strict=True):
            if not by_memory and not tensor.is_contiguous():
                tensor.copy_(changed.view_as(tensor))
        return taken, products[0] if products else None

    def update(
        self, x: Tensor, plan: DispatchPlan, recurrent: State | None, history: Inputs, backend: Backend
    ) -> tuple[Tensor, State, Inputs]:
        """Slots of a plan through the mechanism: outputs `[R, H, V]`, final states and conv histories by segment."""
        projected, history = self.project(x, plan, history)
        inputs = self.mechanism.prepare(projected)
        if plan.writes is not None:
            inputs = self.mechanism.freeze(inputs, ~plan.writes)
        scanned = run(self.mechanism, inputs, plan.cu_seqlens, initial_state=recurrent, backend=backend)
        output = self.mechanism.finish(scanned.output, inputs, projected)
        return output.view(-1, *self.output_shape), scanned.final_state, history

    def output(
        self,
        slots: Tensor,
        token_slot: Tensor,
        weights: Tensor,
        mask: Tensor | None,
        x: Tensor,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Sum over a token's slots, norm over each head, gate, projection: `[R, H, V]` -> `[T, D]`.

        gate: `[T, H * V]`, what gate_proj makes of x; None where that is still to do.
        """
        if gate is None and self.gate_proj is not None:
            gate = self.gate_proj(x)
        gate = None if gate is None else gate.view(-1, *self.output_shape)
        normed = combine_norm(slots, token_slot, weights, mask, self.norm_weight, gate, self.spec.norm_eps)
        projected: Tensor = self.out_proj(normed.flatten(1).to(x.dtype))
        return projected

    def route(self, x: Tensor, mask: Tensor | None) -> Routing:
        """The router's choices, held to its contract."""
        routing = self.router.route(x, mask)
        check_routing(routing, len(x), self.router.slots, self.spec.num_memories)
        return routing

    def initial_state(self, batch_size: int) -> MoMState:
        """The state of `batch_size` sequences that have seen nothing."""
        if not isinstance(batch_size, int) or batch_size < 0:
            raise InputError(f"batch_size = {batch_size}; allowed: integers from 0")
        weight = self.out_proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        n = batch_size * self.num_groups
        # a copy of its own: decoding writes into it, and a rule may hand out views of what it learned
        recurrent = {
            name: tensor.to(weight.device, dtype).clone(memory_format=torch.contiguous_format)
            for name, tensor in self.mechanism.initial_state(n).items()
        }
        history = self.project.empty_history(n)
        shape = (batch_size, self.num_groups)
        return MoMState(
            {name: tensor.unflatten(0, shape) for name, tensor in recurrent.items()},
            {name: tensor.unflatten(0, shape) for name, tensor in history.items()},
        )

    def backend_report(self) -> dict[str, BackendChoice]:
        """Which backend runs what, and why: the scan, a decoding step, and the layer's own steps around them."""
        weight = self.out_proj.weight
        device, sizes, rule = weight.device, self.mechanism.sizes, self.mechanism
        reason = why_no_kernels(device, weight.dtype)
        state = torch.float64 if weight.dtype == torch.float64 else torch.float32
        step = BackendChoice("reference", "one token is one step of the rule")
        return {
            "scan": choose_backend(rule, self.backend, device=device, dtype=weight.dtype, sizes=sizes),
            "step": step if reason else choose_decode_backend(rule, device=device, dtype=state, sizes=sizes),
            "layer": BackendChoice("torch" if reason else "triton", reason or "kernels run around the scan"),
        }

    def parameter_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Two optimizer groups: matrices decay; biases, norms, and gate parameters such as A_log and dt_bias do not."""
        return parameter_groups(self, weight_decay)

    def check_dtype(self, x: Tensor) -> None:
        weight = self.out_proj.weight
        if x.device != weight.device:
            raise InputError(f"x is on {x.device}, the block on {weight.device}")
        mixed = torch.float64 in (x.dtype, weight.dtype) or not torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and mixed:
            raise InputError(f"x is {x.dtype}, the block's weights are {weight.dtype}; cast one, or use autocast")

    def check_state(self, state: MoMState, batch_size: int | None) -> None:
        """A state must have this block's names and shapes, and one row a sequence; as many as it likes if None."""
        if not isinstance(state, MoMState):
            raise InputError(f"state must be a MoMState, got {type(state).__name__}")
        conv: dict[str, tuple[int, ...]] = {p.name: (self.project.width - 1, p.width) for p in self.project.convolved}
        rows: tuple[int, ...] | None = None if batch_size is None else (batch_size,)
        for part, expected in (("recurrent", self.mechanism.state_spec()), ("conv", conv)):
            tensors: dict[str, Tensor] = getattr(state, part)
            if set(tensors) != set(expected):
                raise InputError(f"state.{part} has {sorted(tensors)}; allowed: {sorted(expected)}")
            for name, shape in expected.items():
                if not isinstance(tensors[name], Tensor):
                    raise InputError(f"state.{part}[{name!r}] must be a tensor, got {type(tensors[name]).__name__}")
                rows = tuple(tensors[name].shape[:1]) if rows is None else rows
                wanted = (*rows, self.num_groups, *shape)
                if tuple(tensors[name].shape) != wanted:
                    raise InputError(
                        f"state.{part}[{name!r}] has shape {tuple(tensors[name].shape)}; allowed: {wanted}"
                    )
                if tensors[name].device != self.out_proj.weight.device:
                    raise InputError(f"state.{part}[{name!r}] is on {tensors[name].device}, the block elsewhere")
                # a narrower recurrent state would be rounded at every step
                dtypes = (torch.float32, torch.float64) if part == "recurrent" else FLOATS
                if tensors[name].dtype not in dtypes:
                    raise InputError(f"state.{part}[{name!r}] is {tensors[name].dtype}; allowed: {dtypes}")
                check_finite(tensors[name], f"state.{part}[{name!r}]")


def memory_major(tensor: Tensor) -> Tensor:
    """`[B, M, ...]` -> `[M * B, ...]`: from a state's layout to segments'."""
    return tensor.transpose(0, 1).flatten(0, 1)


def batch_major(tensor: Tensor) -> Tensor:
    """`[B, M, ...]` -> `[B * M, ...]`, contiguous."""
    return tensor.contiguous().flatten(0, 1)


def batch_first(tensor: Tensor, num_groups: int) -> Tensor:
    """`[M * B, ...]` -> `[B, M, ...]`."""
    return tensor.view(num_groups, len(tensor) // num_groups, *tensor.shape[1:]).transpose(0, 1)


def passes(routing: Routing, shared_id: int | None) -> list[tuple[slice, Tensor | None, int | None]]:
    """Choices that a step takes together, all unless some only read, in columns, their writes, and the shared memory.

    The shared memory's column stands behind those of the router, and always writes.
    """
    if routing.writes is None:
        return [(slice(None), None, shared_id)]
    columns = [slice(j, j + 1) for j in range(routing.writes.shape[1] + 1)]
    alone: list[tuple[slice, Tensor | None, int | None]] = [(c, routing.writes[:, c], None) for c in columns[:-1]]
    return alone if shared_id is None else [*alone, (columns[-1], None, shared_id)]


def join_passes(taken: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs of all slots, and the slots of each row, from those of passes over as many slots each."""
    if len(taken) == 1:
        return taken[0]
    slots, token_slot = zip(*taken, strict=True)
    return torch.cat(slots), torch.cat([order + i * len(slots[i]) for i, order in enumerate(token_slot)], 1)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay belongs on a parameter: on matrices named ...weight; never on gates, biases and norms."""
    return parameter.ndim >= 2 and name.endswith("weight")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of any module that holds MoM blocks, in a group that decays and one that does not."""

    def pick(decayed: bool) -> Iterator[nn.Parameter]:
        return (p for n, p in module.named_parameters() if p.requires_grad and is_decayed(n, p) == decayed)

    return [
        {"params": list(pick(True)), "weight_decay": weight_decay},
        {"params": list(pick(False)), "weight_decay": 0.0},
    ]
