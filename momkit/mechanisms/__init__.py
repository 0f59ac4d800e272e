"""Update rules, one a file; `base` is the contract, `reference` and `chunked` run them over packed segments."""

from collections.abc import Callable

from momkit.hookspecs import hookimpl


class builtin:
    """The rules that ship with momkit, behind the hook that any plugin uses."""

    @hookimpl
    def momkit_register_mechanisms(self, register: Callable[[type], None]) -> None:
        from momkit.mechanisms.deltanet import DeltaNet
        from momkit.mechanisms.gated_deltanet import GatedDeltaNet
        from momkit.mechanisms.gla import GLA
        from momkit.mechanisms.gsa import GatedSlotAttention
        from momkit.mechanisms.hgrn2 import HGRN2
        from momkit.mechanisms.kda import KDA
        from momkit.mechanisms.lightning_attention import LightningAttention
        from momkit.mechanisms.linear_attention import LinearAttention
        from momkit.mechanisms.mamba import Mamba
        from momkit.mechanisms.mamba2 import Mamba2
        from momkit.mechanisms.retention import Retention
        from momkit.mechanisms.rwkv6 import RWKV6
        from momkit.mechanisms.rwkv7 import RWKV7
        from momkit.mechanisms.titans import Titans
        from momkit.mechanisms.ttt_linear import TTTLinear

        recurrent = (LinearAttention, Retention, LightningAttention, Mamba2, GLA, HGRN2, RWKV6, Mamba)
        erasing = (DeltaNet, GatedDeltaNet, KDA, RWKV7)
        others = (GatedSlotAttention, TTTLinear, Titans)
        for cls in (*recurrent, *erasing, *others):
            register(cls)
