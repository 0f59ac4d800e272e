"""momkit: Mixture-of-Memories sequence layers from pluggable update rules and routers."""

from momkit.block import MoMBlock, MoMOutput
from momkit.decode import decode
from momkit.hookspecs import hookimpl
from momkit.mechanisms.base import Mechanism, MechanismSpec
from momkit.registry import register
from momkit.routing.base import Router, RouterSpec, Routing
from momkit.scan import ScanOutput, scan
from momkit.spec import MoMSpec
from momkit.state import MoMState

__version__ = "0.1.0"

__all__ = [
    "Mechanism",
    "MechanismSpec",
    "MoMBlock",
    "MoMOutput",
    "MoMSpec",
    "MoMState",
    "Router",
    "RouterSpec",
    "Routing",
    "ScanOutput",
    "decode",
    "hookimpl",
    "register",
    "scan",
]
