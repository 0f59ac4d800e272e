"""One step of any affine rule, read straight off its structure.

Used by tests alone: each rule's own step and the chunked form are both held to it.
"""

from torch import Tensor

from momkit.mechanisms.base import Affine, Structure, outer, read


def affine_step(structure: Structure, S: Tensor, x: Affine) -> tuple[Tensor, Tensor]:
    """One token of the rule that `structure` declares; returns the new state and the output.

    D = decay(S);  S' = D + b (a^T E) + k v^T, E = D or S;  o = scale q^T S', or scale q^T (S + Diag(u) k v^T)

    S `[..., K, V]`, inputs as in `Affine` without the axis T; delta is a = -beta k, b = k, v = beta v.
    """
    decayed = S
    if structure.decay in ("constant", "head"):
        decayed = S * x.need("g").exp()[..., None, None]
    elif structure.decay == "key":
        decayed = S * x.need("gk").exp()[..., None]
    elif structure.decay == "value":
        decayed = S * x.need("gv").exp()[..., None, :]

    seen = decayed if structure.erase_sees == "decayed" else S
    v = x.v
    if structure.erase == "delta":
        beta = x.need("beta")[..., None]
        v, a, b = beta * v, -beta * x.k, x.k
    elif structure.erase == "low_rank":
        a, b = x.need("a"), x.need("b")
    write = outer(x.k, v)
    after = decayed + write
    if structure.erase != "none":
        after = after + outer(b, read(seen, a))

    if structure.read == "after":
        return after, x.scale * read(after, x.q)
    bonus = 0.0 if x.u is None else x.u[..., None] * write
    return after, x.scale * read(S + bonus, x.q)
