"""Finding plugins: built-ins and installed packages come through the same hooks, and a broken one breaks nothing else.

The entry-point group is `momkit`. MOMKIT_PLUGINS limits what is loaded: unset loads every installed plugin, an empty
value loads none, a comma-separated list of entry-point names loads those. Built-ins are always there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pluggy

from momkit import hookspecs
from momkit.mechanisms import builtin as builtin_mechanisms
from momkit.routing import builtin as builtin_routers
from momkit.tasks import builtin as builtin_tasks

GROUP = "momkit"
BUILTIN = "momkit"
HOOKS = {"mechanism": "momkit_register_mechanisms", "router": "momkit_register_routers", "task": "momkit_register_tasks"}


@dataclass
class Plugin:
    """One plugin: where it comes from, what it registered, and what went wrong, if anything did."""

    name: str
    distribution: str
    version: str
    target: str
    registered: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in HOOKS})
    error: str | None = None


def chosen(name: str) -> bool:
    """Whether MOMKIT_PLUGINS lets the plugin `name` be loaded."""
    wanted = os.environ.get("MOMKIT_PLUGINS")
    return wanted is None or name in {part.strip() for part in wanted.split(",")}


def requested() -> set[str]:
    """The names that MOMKIT_PLUGINS asks for."""
    return {part.strip() for part in os.environ.get("MOMKIT_PLUGINS", "").split(",") if part.strip()}


def builtin_plugins() -> list[tuple[Plugin, Any]]:
    """The library's own rules, routers and tasks, behind the same hooks as anybody's."""
    version = metadata.version("momkit") if _installed() else "source"
    sources = (builtin_mechanisms, builtin_routers, builtin_tasks)
    return [(Plugin(BUILTIN, "momkit", version, source.__module__), source()) for source in sources]


def _installed() -> bool:
    try:
        metadata.version("momkit")
    except metadata.PackageNotFoundError:
        return False
    return True


def installed_plugins() -> list[tuple[Plugin, Any]]:
    """Every installed plugin that MOMKIT_PLUGINS allows, imported; one that fails carries its error instead."""
    found: list[tuple[Plugin, Any]] = []
    names = set()
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: e.name):
        names.add(entry.name)
        if not chosen(entry.name):
            continue
        distribution = entry.dist.name if entry.dist else "unknown"
        plugin = Plugin(entry.name, distribution, entry.dist.version if entry.dist else "unknown", entry.value)
        try:
            module = entry.load()
        except BaseException as fault:
            if isinstance(fault, KeyboardInterrupt):
                raise
            plugin.error = f"{type(fault).__name__}: {fault}"
            module = SimpleNamespace()
        found.append((plugin, module))
    for name in sorted(requested() - names):
        fault_text = f"MOMKIT_PLUGINS asks for {name!r}, which is not installed"
        found.append((Plugin(name, "unknown", "unknown", "", error=fault_text), SimpleNamespace()))
    return found


def load(register: Callable[[str, type, str], None], withdraw: Callable[[str], None]) -> list[Plugin]:
    """Load every plugin and pass what it offers to `register(kind, cls, owner)`.

    A plugin whose import or hook raises is recorded with its error, and what it had registered is withdrawn.
    """
    plugins: list[Plugin] = []
    for plugin, source in builtin_plugins() + installed_plugins():
        plugins.append(plugin)
        if plugin.error is None:
            try:
                call_hooks(plugin, source, register)
            except Exception as fault:
                if plugin.name == BUILTIN:
                    raise
                plugin.error = f"{type(fault).__name__}: {fault}"
                plugin.registered = {kind: [] for kind in HOOKS}
                withdraw(plugin.name)
    return plugins


def call_hooks(plugin: Plugin, source: Any, register: Callable[[str, type, str], None]) -> None:
    """Call the hooks of one plugin, in a manager of its own, so that its faults are its own."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(source, plugin.name)
    manager.check_pending()
    for kind, hook in HOOKS.items():

        def register_one(cls: type, kind: str = kind) -> None:
            register(kind, cls, plugin.name)
            plugin.registered[kind].append(getattr(cls, "name"))

        getattr(manager.hook, hook)(register=register_one)
