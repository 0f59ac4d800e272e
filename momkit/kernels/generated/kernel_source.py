"""The whole module of a rule's generated kernels: its step, the step's gradient, and the loops over tokens."""

import keyword

from momkit.kernels.generated.graph import Graph
from momkit.kernels.generated.loops import BACKWARD, FORWARD, HEADER, LOAD_TOKEN, fill
from momkit.kernels.generated.program import Named, Program, pow2
from momkit.kernels.generated.step_source import StepSource, index_of
from momkit.kernels.generated.tile_source import Tiles

# names that inputs and states of a rule can't have in the source, nor such beginnings and ends
WORDS = """tl triton range float tile head segment segments place row rows T i begin end first last chunk chunks length
at before slot there turn worker programs places covered output cu_seqlens state_index BLOCK LENGTH TILES step advance
pull load_token forward backward sigmoid expm1 log1p tanh sign trunc bounds_of PROGRAM Program Named"""
TAKEN = frozenset(WORDS.split())
BEGINNINGS = ("at_", "d_", "sum_")
ENDS = ("_ptr", "_start", "_end", "_saved", "_work", "_ahead", "_at")


def module_source(program: Program, step: Graph, gradient: Graph) -> str:
    """The source of a module with PROGRAM and the kernels `forward` and `backward`."""
    return KernelSource(program).module(step, gradient)


class KernelSource:
    """Writes the module of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tiles = Tiles(program)
        self.states = [self.named("state", state.name, program.inputs) for state in program.states]
        self.inputs = [self.named("input", x.name) for x in program.inputs]
        inputs = list(zip(self.inputs, program.inputs, strict=True))
        self.of_states = list(zip(self.states, program.states, strict=True))
        self.of_tokens = [(n, x) for n, x in inputs if x.has_time]
        self.of_constants = [(n, x) for n, x in inputs if not x.has_time]
        every = (*program.inputs, *program.states, program.output)
        axes = dict.fromkeys(program.axis(a) for x in every for a in x.axes if a != "T")
        self.axes = [a for a in axes if a == program.head or program.sizes[a] > 1 or a == program.column]

    @staticmethod
    def named(kind: str, name: str, others: tuple[Named, ...] = ()) -> str:
        """A variable for a tensor that collides with no other."""
        clash = name in TAKEN or keyword.iskeyword(name) or name in {x.name for x in others}
        odd = (name[:1] == "x" and name[1:].isdigit()) or name.startswith(BEGINNINGS) or name.endswith(ENDS)
        return f"{kind}_{name}_" if clash or odd else name

    @property
    def indices(self) -> list[str]:
        return [index_of(a) for a in self.axes]

    def module(self, step: Graph, gradient: Graph) -> str:
        program, parts = self.program, self.parts()
        names = {f"state {s.name}": n for n, s in self.of_states}
        names |= {f"d_state {s.name}": f"d_{n}" for n, s in self.of_states}
        names |= {f"input {x.name}": n for n, x in zip(self.inputs, program.inputs, strict=True)}
        names["d_output"] = "d_output"
        values, cotangents = [*self.states, *self.inputs], [*(f"d_{n}" for n in self.states), "d_output"]
        forward, backward = StepSource(program, step, names), StepSource(program, gradient, names)
        new, pulled = "New states and output.", "Gradients of states and inputs, from those of new states and output."
        functions = [
            forward.function("step", new, [*values, *self.indices], step.results),
            forward.function("advance", "New states.", [*values, *self.indices], step.results[: len(self.states)]),
            backward.function("pull", pulled, [*values, *cotangents, *self.indices], gradient.results),
        ]
        loops = [fill(template, parts) for template in (LOAD_TOKEN, FORWARD, BACKWARD)]
        return "\n\n".join([fill(HEADER, parts).rstrip() + "\n", *functions, *loops])

    def parts(self) -> dict[str, str | list[str]]:
        """What the templates have in braces."""
        program, states, inputs = self.program, self.states, self.inputs
        forward = [f"{n}_ptr" for n in inputs] + [f"{n}_{what}" for what in ("start", "end", "saved") for n in states]
        backward = [f"{n}_ptr" for n in inputs] + [f"{n}_{what}" for what in ("saved", "work") for n in states]
        backward += ["output_ptr", *(f"d_{n}_end" for n in states), *(f"d_{n}_start" for n in states)]
        backward += [f"d_{n}_ptr" for n in inputs]
        lists = {
            "forward_ptrs": forward,
            "backward_ptrs": backward,
            "token_ptrs": [f"{n}_ptr" for n, _ in self.of_tokens],
            "states": states,
            "inputs": inputs,
            "d_states": [f"d_{n}" for n in states],
            "d_inputs": [f"d_{n}" for n in inputs],
            "ahead": [f"{n}_ahead" for n, _ in self.of_tokens],
        }
        plain = {"rule": repr(program.rule), "program": repr(program), "first_state": states[0]}
        # with all sizes 1 there are none
        plain["comma_indices"] = "".join(f", {index}" for index in self.indices)
        plain |= {"columns": str(program.columns), "heads": str(program.heads)}
        joined = {name: ", ".join(entries) for name, entries in lists.items()}
        return plain | joined | self.loads() | self.stores()

    def loads(self) -> dict[str, str | list[str]]:
        program, tiles, states = self.program, self.tiles, self.of_states
        token = [tiles.load(f"{n}_ptr", x, "row", "there") for n, x in self.of_tokens]
        returned = [f"return {token[0]}"] if len(token) == 1 else ["return (", *(f"    {x}," for x in token), ")"]

        def start(n: str, state: Named) -> str:
            return tiles.load(f"{n}_start", state, "row")

        def end(n: str, state: Named) -> str:
            return tiles.load(f"d_{n}_end", state, "segment", *tiles.once(state))

        def work(n: str, state: Named) -> str:
            return f"{n}_work + tl.cast(worker, tl.int64) * (LENGTH * {tiles.work_size(state)})"

        return {
            "place": self.place(),
            "load_token": returned,
            "load_constants": [f"{n} = {tiles.load(f'{n}_ptr', x, '')}.to(tl.float32)" for n, x in self.of_constants],
            "load_starts": [
                line
                for n, s in states
                for line in [f"{n} = {tiles.zeros(s)}", *when(f"{n}_start", f"{n} = {start(n, s)}")]
            ],
            "load_d_ends": [
                line
                for n, s in states
                for line in [f"d_{n} = {tiles.zeros(s)}", *when(f"d_{n}_end", f"d_{n} = {end(n, s)}")]
            ],
            "arrive": [f"{n} = {n}_ahead.to(tl.float32)" for n, _ in self.of_tokens],
            "arrive_states": [f"{n} = {n}_ahead" for n in self.states],
            "last_states": [f"{n}_ahead = {n}" for n in self.states],
            "load_saved": [f"{n} = {tiles.load_part(f'{n}_saved', s, 'slot')}" for n, s in states],
            "find_work": [f"{n}_at = {work(n, s)}{tiles.work_offsets(s)}" for n, s in states],
            "load_work": [f"{n}_ahead = tl.load({n}_at + before * {tiles.work_size(s)})" for n, s in states],
            "load_d_output": tiles.load("output_ptr", program.output, "row", *tiles.once(program.output)),
            "zero_sums": [f"sum_{n} = {tiles.zeros(x)}" for n, x in self.of_constants],
            "add_sums": [f"sum_{n} += d_{n}" for n, _ in self.of_constants],
        }

    def stores(self) -> dict[str, str | list[str]]:
        tiles, states, output = self.tiles, self.of_states, self.program.output

        def gradient(n: str, tensor: Named, row: str, value: str, pointer: str) -> list[str]:
            return when(f"d_{n}_{pointer}", tiles.store_part(f"d_{n}_{pointer}", tensor, row, value))

        return {
            "store_output": [tiles.store("output_ptr", output, "tl.cast(begin + i, tl.int64)", "output")],
            "store_no_output": [tiles.store("output_ptr", output, "tl.cast(begin + i, tl.int64)", "0.0")],
            "store_ends": [tiles.store(f"{n}_end", s, "row", n) for n, s in states],
            "save_states": [tiles.store_part(f"{n}_saved", s, "slot", n, *tiles.once_a_head(s)) for n, s in states],
            "store_work": [f"tl.store({n}_at + i * {tiles.work_size(s)}, {n})" for n, s in states],
            "store_gradients": [
                line for n, x in self.of_tokens for line in gradient(n, x, tiles.token_row(x), f"d_{n}", "ptr")
            ],
            "store_no_gradients": [
                line for n, x in self.of_tokens for line in gradient(n, x, tiles.token_row(x), "0.0", "ptr")
            ],
            "store_sums": [
                line for n, x in self.of_constants for line in gradient(n, x, tiles.segment_row(x), f"sum_{n}", "ptr")
            ],
            "store_d_starts": [
                line for n, s in states for line in gradient(n, s, tiles.segment_row(s), f"d_{n}", "start")
            ],
        }

    def place(self) -> list[str]:
        """Where a program stands."""
        program, count = self.program, self.program.heads
        text = ["tile = tl.cast(place % TILES, tl.int64)", f"head = place // TILES % {count}"]
        text += [f"segment = tl.cast(place // (TILES * {count}), tl.int64)"]
        for axis in self.axes:
            if axis == program.head:
                text.append(f"{index_of(axis)} = head")
            elif axis == program.column:
                text.append(f"{index_of(axis)} = (place % TILES) * BLOCK + tl.arange(0, BLOCK)")
            else:
                text.append(f"{index_of(axis)} = tl.arange(0, {pow2(program.sizes[axis])})")
        return text


def when(pointer: str, line: str) -> list[str]:
    """A line for a tensor that may be left out."""
    return [f"if {pointer} is not None:", f"    {line}"]
