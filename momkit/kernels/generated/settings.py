"""How a generated kernel is launched: columns of a tile, warps, and how often states are saved; nothing is tuned."""

import math

import torch

from momkit.kernels.generated.program import Program, pow2
from momkit.kernels.launch import cdiv
from momkit.kernels.tuning import multiprocessors

# columns of a tile at least, programs wanted on each multiprocessor, numbers of the states in a program at most if it
# can be helped
LEAST_BLOCK = 8
OCCUPANCY = 4
MOST_STATE = 4096
# numbers of the states that one warp holds by itself, and beside others
ALONE = 1024
WARP_SHARE = 512
# more would leave a thread too few registers for gradients
MOST_WARPS = 8
# programs of the backward pass on each multiprocessor, at most: their states of a chunk should stay in the L2 cache
MOST_WORKERS = 8
LENGTHS = (16, 128)


def block_of(program: Program, segments: int, device: torch.device) -> int:
    """Columns of a tile: as many as there are, unless too few programs would leave a GPU idle.

    A tile takes along all states that have no columns, so it is not made so narrow that these are most of its work.
    """
    block = program.widest_block()
    wanted = OCCUPANCY * multiprocessors(device)
    while block > LEAST_BLOCK:
        now, narrower = program.state_elements(block), program.state_elements(block // 2)
        busy = segments * program.heads * cdiv(program.columns, block) >= wanted
        if now - narrower < now / 4 or (busy and now <= MOST_STATE):
            break
        block //= 2
    return block


def warps_of(program: Program, block: int) -> int:
    """Warps of a program: one where a thread can keep all it needs, since sums over warps take long."""
    elements = program.state_elements(block)
    return 1 if elements <= ALONE else min(MOST_WARPS, pow2(elements // WARP_SHARE))


def length_of(num_tokens: int, segments: int) -> int:
    """Tokens between saved states: about as many as there are saved states in a segment."""
    wanted = math.isqrt(max(1, num_tokens // max(1, segments)))
    return min(max(LENGTHS[0], 1 << wanted.bit_length() >> 1), LENGTHS[1])


def workers_of(places: int, device: torch.device) -> int:
    """Programs of the backward pass."""
    return min(places, MOST_WORKERS * multiprocessors(device))
