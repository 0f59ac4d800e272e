"""The loops of generated kernels, as templates: what depends on the rule stands in braces.

forward: one program walks one segment, for one head and one tile of columns, and keeps its states in registers
backward: states are computed again from those saved every LENGTH tokens, then the gradient walks back in time

Inputs of the next token are loaded before the work on this one.
"""

HEADER = '''"""Generated from the step of {rule}; what is written here is written anew when the step changes."""

import triton
import triton.language as tl

from momkit.kernels.generated.helpers import bounds_of, expm1, log1p, sigmoid, sign, tanh, trunc
from momkit.kernels.generated.program import Named, Program

PROGRAM = {program}

'''

LOAD_TOKEN = '''@triton.jit
def load_token({token_ptrs}, row, there{comma_indices}):
    """The inputs of one token, as they are stored."""
    {load_token}
'''

FORWARD = '''@triton.jit(do_not_specialize=["T", "segments"])
def forward(
    {forward_ptrs}, output_ptr, cu_seqlens, state_index, T, segments,
    BLOCK: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """One segment, one head, one tile of columns; with `state_index` one token of each row."""
    TILES: tl.constexpr = ({columns} + BLOCK - 1) // BLOCK
    place = tl.program_id(0)
    {place}
    row = segment
    covered = segment < segments
    if state_index is None:
        begin, end = bounds_of(cu_seqlens, segment, segments, T)
    else:
        begin = tl.cast(segment, tl.int32)
        end = begin + 1
        row = tl.load(state_index + segment).to(tl.int64)
        covered = row >= 0
    if not covered:
        for i in range(end - begin):
            {store_no_output}
        return
    {load_constants}
    {load_starts}
    {ahead} = load_token({token_ptrs}, tl.cast(begin, tl.int64), begin < end{comma_indices})
    for i in range(end - begin):
        {arrive}
        at = tl.cast(tl.minimum(begin + i + 1, end - 1), tl.int64)
        {ahead} = load_token({token_ptrs}, at, begin < end{comma_indices})
        if {first_state}_saved is not None:
            if i % LENGTH == 0:
                slot = begin // LENGTH + segment + i // LENGTH
                {save_states}
        {states}, output = step({states}, {inputs}{comma_indices}, BLOCK)
        {store_output}
    {store_ends}
'''

BACKWARD = '''@triton.jit(do_not_specialize=["T", "segments"])
def backward(
    {backward_ptrs}, cu_seqlens, T, segments,
    BLOCK: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Segments, heads and tiles of columns in turn; `output_ptr` is the gradient of the output."""
    TILES: tl.constexpr = ({columns} + BLOCK - 1) // BLOCK
    places = (segments + 1) * {heads} * TILES
    programs = tl.num_programs(0)
    worker = tl.program_id(0)
    {find_work}
    for turn in range(tl.cdiv(places - worker, programs)):
        place = worker + turn * programs
        {place}
        begin, end = bounds_of(cu_seqlens, segment, segments, T)
        if segment == segments:
            for i in range(end - begin):
                row = tl.cast(begin + i, tl.int64)
                {store_no_gradients}
        else:
            {load_constants}
            {load_d_ends}
            {zero_sums}
            chunks = tl.cdiv(end - begin, LENGTH)
            for chunk in range(chunks):
                first = begin + (chunks - 1 - chunk) * LENGTH
                length = tl.minimum(end - first, LENGTH)
                slot = begin // LENGTH + segment + chunks - 1 - chunk
                {load_saved}
                {ahead} = load_token({token_ptrs}, tl.cast(first, tl.int64), begin < end{comma_indices})
                for i in range(length - 1):
                    {arrive}
                    {ahead} = load_token({token_ptrs}, tl.cast(first + i + 1, tl.int64), begin < end{comma_indices})
                    {store_work}
                    {states} = advance({states}, {inputs}{comma_indices}, BLOCK)
                {last_states}
                # each warp may read what another has written
                tl.debug_barrier()
                row = tl.cast(first + length - 1, tl.int64)
                output_ahead = {load_d_output}
                for i in range(length):
                    at = tl.cast(first + length - 1 - i, tl.int64)
                    {arrive_states}
                    {arrive}
                    d_output = output_ahead.to(tl.float32)
                    before = tl.maximum(length - 2 - i, 0)
                    row = tl.cast(first + before, tl.int64)
                    {load_work}
                    {ahead} = load_token({token_ptrs}, row, begin < end{comma_indices})
                    output_ahead = {load_d_output}
                    {d_states}, {d_inputs} = pull({states}, {inputs}, {d_states}, d_output{comma_indices}, BLOCK)
                    row = at
                    {store_gradients}
                    {add_sums}
                tl.debug_barrier()
            {store_sums}
            {store_d_starts}
'''


def fill(template: str, parts: dict[str, str | list[str]]) -> str:
    """A template with its braces filled; a list takes a line for each entry, indented as its brace is."""
    text = []
    for line in template.splitlines():
        name = line.strip()[1:-1]
        entry = parts.get(name) if line.strip() == f"{{{name}}}" else None
        if isinstance(entry, list):
            indent = line[: len(line) - len(line.lstrip())]
            text += [indent + part for part in entry]
        else:
            text.append(line.format_map(parts) if "{" in line else line)
    return "\n".join(text) + "\n"
