"""The Mixture-of-Memories block: route, dispatch, project, scan, combine, output.

Letters: B sequences, T tokens, D hidden size, M memories, J slots a token, R slots, N segments, H heads, V value dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momkit.checks import FLOATS, check_finite, check_routing
from momkit.decode import choose_decode_backend, run_decode
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
    def step(self, x: Tensor, state: MoMState) -> MoMOutput:
        """Decode one token of each sequence: `x` `[B, D]`; only the memories of its slots change, in place.

        A router that separates writing from reading takes one pass a choice, so that reads see the token's own writes.
        """
        check_hidden_states(x, self.spec.hidden_size)
        if x.ndim != 2:
            raise InputError(f"x has shape {tuple(x.shape)}; allowed: [B, D]")
        self.check_dtype(x)
        self.check_state(state, len(x))
        state.cut()
        routing = self.route(x, None)
        memory_ids, writes = choices(routing, self.spec.num_memories, self.spec.shared_memory)
        passes = [slice(None)] if writes is None else [slice(j, j + 1) for j in range(memory_ids.shape[1])]
        take_step = self.step_fused if on_kernels(x) else self.step_slots
        slots, token_slot, seen = [], [], 0
        for columns in passes:
            output, where = take_step(x, memory_ids[:, columns], None if writes is None else writes[:, columns], state)
            slots.append(output)
            token_slot.append(where + seen)
            seen += len(output)
        y = self.output(torch.cat(slots), torch.cat(token_slot, 1), routing.weights, None, x)
        return MoMOutput(y, state, routing.aux_loss, routing)

    def step_slots(
        self, x: Tensor, memory_ids: Tensor, writes: Tensor | None, state: MoMState
    ) -> tuple[Tensor, Tensor]:
        """One token of each sequence in some of its memories `[B, J]`: outputs of the slots, and the slot of each."""
        plan = make_step_plan(memory_ids, writes, self.num_groups)
        rows = (plan.slot_token, plan.memory)
        output, recurrent, history = self.update(
            x,
            plan,
            {name: tensor[rows] for name, tensor in state.recurrent.items()},
            {name: tensor[rows] for name, tensor in state.conv.items()},
            "reference",
        )
        for part, new in ((state.recurrent, recurrent), (state.conv, history)):
            for name, tensor in part.items():
                tensor[rows] = new[name].to(tensor.dtype)
        return output, plan.token_slot

    def step_fused(
        self, x: Tensor, memory_ids: Tensor, writes: Tensor | None, state: MoMState
    ) -> tuple[Tensor, Tensor]:
        """The same in a handful of kernels, on states where they lie."""
        (B, J), M = memory_ids.shape, self.num_groups
        projected = self.project.step(x, memory_ids, writes, state.conv)
        inputs = self.mechanism.prepare(projected)
        if writes is not None:
            inputs = self.mechanism.freeze(inputs, ~writes.flatten())
        states, b = state.recurrent, torch.arange(B, device=x.device)[:, None]
        # a forward pass leaves states memory by memory
        by_memory = all(tensor.transpose(0, 1).is_contiguous() for tensor in states.values())
        pool = {name: memory_major(x) if by_memory else x.flatten(0, 1) for name, x in states.items()}
        row = memory_ids * B + b if by_memory else b * M + memory_ids
        output = run_decode(self.mechanism, inputs, pool, row.flatten())
        if not by_memory and not all(tensor.is_contiguous() for tensor in states.values()):
            for name, tensor in states.items():
                tensor.copy_(pool[name].view_as(tensor))
        output = self.mechanism.finish(output, inputs, projected)
        return output.view(-1, *self.output_shape), torch.arange(B * J, device=x.device).view(B, J)

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

    def output(self, slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
        """Sum over a token's slots, norm over each head, gate, projection: `[R, H, V]` -> `[T, D]`."""
        gate = None if self.gate_proj is None else self.gate_proj(x).view(-1, *self.output_shape)
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

    def check_state(self, state: MoMState, batch_size: int) -> None:
        """A state must have this block's names and shapes, and one row a sequence."""
        if not isinstance(state, MoMState):
            raise InputError(f"state must be a MoMState, got {type(state).__name__}")
        conv: dict[str, tuple[int, ...]] = {p.name: (self.project.width - 1, p.width) for p in self.project.convolved}
        for part, expected in (("recurrent", self.mechanism.state_spec()), ("conv", conv)):
            tensors: dict[str, Tensor] = getattr(state, part)
            if set(tensors) != set(expected):
                raise InputError(f"state.{part} has {sorted(tensors)}; allowed: {sorted(expected)}")
            for name, shape in expected.items():
                if not isinstance(tensors[name], Tensor):
                    raise InputError(f"state.{part}[{name!r}] must be a tensor, got {type(tensors[name]).__name__}")
                wanted = (batch_size, self.num_groups, *shape)
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


def batch_first(tensor: Tensor, num_groups: int) -> Tensor:
    """`[M * B, ...]` -> `[B, M, ...]`."""
    return tensor.view(num_groups, len(tensor) // num_groups, *tensor.shape[1:]).transpose(0, 1)


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
