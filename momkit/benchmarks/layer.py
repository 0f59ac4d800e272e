"""What a whole MoM block costs on a GPU: training, skewed routing, decoding, the first step, host synchronisations."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from momkit.benchmarks.cuda import Options, check_cuda, load_triton, print_seconds, seconds_in_new_process, timings
from momkit.benchmarks.layer_cases import (
    PROMPT,
    Shape,
    block_call,
    check_step,
    check_training,
    hidden_states,
    layer_spec,
    make_layer,
    training_step,
)
from momkit.benchmarks.peers import PEER_LAYERS, load, peer_layer, peer_layer_call, peer_step
from momkit.benchmarks.timing import captured, environment, peak_bytes
from momkit.block import MoMBlock
from momkit.errors import InputError
from momkit.routing.balance import memory_load
from momkit.state import MoMState

SHAPES = (Shape(1024, 8, 2048), Shape(1024, 1, 32768), Shape(2048, 8, 2048))
SMALL = SHAPES[0]
BATCHES = (1, 16, 64, 512)
# decoding goes through several layers, as a model does: a step finds neither its weights nor its states in the L2 cache
LAYERS = 4
BYTES_PER_SECOND = 3.35e12
GRAPH = "momkit, graph"

Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


def train(options: Options) -> Iterator[Row]:
    """One training step at each shape, eager and as a CUDA graph, beside the peer's layers."""
    for shape in SHAPES:
        yield train_at(shape, options)
        release()


def train_at(shape: Shape, options: Options) -> Row:
    x, grad_output = hidden_states(shape), hidden_states(shape, seed=2)
    block = make_layer(layer_spec(shape.hidden_size))
    row: Row = {**asdict(shape), "from_float64": check_training(block), "parameters": {"momkit": count(block)}}
    steps: Calls = {"momkit": training_step(block_call(block), block, x, grad_output)}

    def make(peer: str, name: str) -> Callable[[], Any]:
        layer = peer_layer(peer, name, block.spec).to("cuda")
        row["parameters"][f"{peer} {name}"] = count(layer)
        return training_step(peer_layer_call(peer, layer), layer, x, grad_output)

    if options.peer:
        for name in PEER_LAYERS[options.peer]:
            add_peer(row, steps, options.peer, name, make)
    row["peak_bytes"] = {name: peak_bytes(step) for name, step in steps.items()}
    steps[GRAPH] = captured(steps["momkit"])
    row["forward_backward"] = timings(steps, options)
    return row


def add_peer(row: Row, steps: Calls, peer: str, name: str, make: Callable[[str, str], Callable[[], Any]]) -> None:
    """Add a call of the peer's to those measured if it runs."""
    try:
        call = make(peer, name)
        call()
        torch.cuda.synchronize()
    except Exception as fault:  # a fault of the peer's is a finding about the peer
        row.setdefault("peer_errors", {})[f"{peer} {name}"] = f"{type(fault).__name__}: {fault}"
    else:
        steps[f"{peer} {name}"] = call


def routing(options: Options) -> Iterator[Row]:
    """A training step when all tokens go to two memories against balanced ones, and with 16 memories against 4."""
    x, grad_output = hidden_states(SMALL), hidden_states(SMALL, seed=2)
    x[..., 0] = 1
    spec = layer_spec(SMALL.hidden_size)
    balanced, collapsed = make_layer(spec), make_layer(spec)
    with torch.no_grad():
        # on top of logits of order one
        collapsed.get_parameter("router.weight")[:2, 0] += 50
    more = make_layer(layer_spec(SMALL.hidden_size, num_memories=16))
    for blocks in ({"balanced": balanced, "collapsed": collapsed}, {"4 memories": balanced, "16 memories": more}):
        steps = {name: training_step(block_call(b), b, x, grad_output) for name, b in blocks.items()}
        load = {name: load_of(block, x) for name, block in blocks.items()}
        yield {**asdict(SMALL), "load": load, "forward_backward": timings(steps, options)}
    release()


def load_of(block: MoMBlock, x: Tensor) -> list[float]:
    """The share of the choices that fell on each memory."""
    ids = choices_of(block, x.flatten(0, 1))
    return [round(share, 4) for share in (memory_load(ids, block.spec.num_memories) / ids.numel()).tolist()]


@torch.no_grad()
def choices_of(block: MoMBlock, x: Tensor) -> Tensor:
    return block.route(x, None).memory_ids


def decode(options: Options) -> Iterator[Row]:
    """One token for each row of a batch, through one layer: eager and as a CUDA graph, beside the peer's, eager."""
    blocks = [make_layer(layer_spec(SMALL.hidden_size), seed) for seed in range(LAYERS)]
    for batch in BATCHES:
        yield decode_at(blocks, batch, options)
        release()


def decode_at(blocks: Sequence[MoMBlock], batch: int, options: Options) -> Row:
    block, width = blocks[0], SMALL.hidden_size
    row: Row = {"hidden_size": width, "batch": batch, "from_float64": check_step(block, min(batch, 16))}
    x = hidden_states(Shape(width, batch, 1))[:, 0]
    states = [block.initial_state(batch) for block in blocks]

    def run() -> None:
        for block, state in zip(blocks, states, strict=True):
            block.step(x, state)

    def make(peer: str, name: str) -> Callable[[], Any]:
        layer = peer_layer(peer, name, block.spec).to("cuda")
        step = peer_step(peer, layer, hidden_states(Shape(width, batch, PROMPT)))
        return lambda: step(x)

    steps: Calls = {"momkit": run, GRAPH: captured(run)}
    ours = tuple(steps)
    if options.peer:
        add_peer(row, steps, options.peer, "mom", make)
    row["timings"] = timings(steps, options)
    # of one layer: ours go through all of them, a peer's through one
    row["seconds"] = {name: t["median"] / (len(blocks) if name in ours else 1) for name, t in row["timings"].items()}
    row["bytes"] = step_bytes(block, states[0], x)
    row["bytes_per_second"] = row["bytes"] / row["seconds"][GRAPH]
    row["share"] = row["bytes_per_second"] / BYTES_PER_SECOND
    return row


def step_bytes(block: MoMBlock, state: MoMState, x: Tensor) -> int:
    """What a step must move: states of its slots in and out, weights that are used, hidden states in and out."""
    ids, shared = choices_of(block, x), block.spec.shared_memory
    used, slots = len(set(ids.flatten().tolist())) + shared, ids.shape[1] + shared
    memory_weight = size_of(block.get_parameter("project.memory_weight"))
    unused = memory_weight * (block.num_groups - used) // block.num_groups
    weights = sum(size_of(parameter) for parameter in block.parameters()) - unused
    return 2 * state.nbytes() * slots // block.num_groups + weights + 2 * size_of(x)


def first_step(options: Options) -> Iterator[Row]:
    """Seconds of the first training step of a process with nothing compiled, after imports and CUDA's start."""
    program = "from momkit.benchmarks import layer; layer.print_first_step()"
    yield {**asdict(SMALL), "seconds": seconds_in_new_process(program, "the first training step")}


def print_first_step() -> None:
    """Time the first training step of this process and print its seconds."""
    load_triton()
    print_seconds(small_step())


def small_step() -> Callable[[], Any]:
    """The training step of the smallest shape."""
    block = make_layer(layer_spec(SMALL.hidden_size))
    return training_step(block_call(block), block, hidden_states(SMALL), hidden_states(SMALL, seed=2))


def syncs(options: Options) -> Iterator[Row]:
    """How often the host waits for the GPU in a training step and in a decoding step."""
    block = make_layer(layer_spec(SMALL.hidden_size))
    x, state = hidden_states(Shape(SMALL.hidden_size, 16, 1))[:, 0], block.initial_state(16)
    # a count that does not see a wait would promise anything
    if (known := count_syncs(lambda: x.sum().item())) != 1:
        raise RuntimeError(f"one synchronisation was counted as {known}")
    for what, call in (("training step", small_step()), ("decoding step", lambda: block.step(x, state))):
        yield {"what": what, "syncs": count_syncs(call)}


def count_syncs(call: Callable[[], Any]) -> int:
    """How often a call, once compiled, makes the host wait for the GPU."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in caught)


def count(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def release() -> None:
    """Give back what the row before held, graphs among it."""
    gc.collect()
    torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "train": train,
    "routing": routing,
    "decode": decode,
    "first_step": first_step,
    "syncs": syncs,
}


def sections_of(only: Sequence[str] = ()) -> list[str]:
    """The sections in order, or those of them asked for; InputError for what is unknown."""
    if unknown := [name for name in only if name not in SECTIONS]:
        raise InputError(f"only = {unknown[0]!r}; allowed with --layer: {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if not only or name in only]


def measure(only: Sequence[str], options: Options, say: Callable[[str], None] = print) -> Iterator[Row]:
    """Measure section by section; yields the result as it grows, so that what there is can be kept."""
    check_cuda()
    load_triton()
    if options.peer:
        for op in PEER_LAYERS[options.peer].values():
            load(options.peer, op)
    what = "bfloat16 with float32 gates, router and states; medians between CUDA events, candidates interleaved"
    result: Row = {"what": f"{what}, L2 flushed", "rounds": options.rounds, "peer": options.peer}
    result |= environment("cuda", ("momkit", "torch", "triton", *([options.peer] if options.peer else [])))
    for name in sections_of(only):
        start = time.perf_counter()
        result[name] = list(SECTIONS[name](options))
        say(f"layer: {name}, {time.perf_counter() - start:.0f} s")
        yield result
