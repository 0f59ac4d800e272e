"""Finding plugins: built-ins and installed packages come through the same hooks, and a broken one breaks nothing else.

The entry-point group is `momkit`. MOMKIT_PLUGINS limits what is loaded: unset loads every installed plugin, an empty
value loads none, a comma-separated list of entry-point names loads those. Built-ins are always there.
"""

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from momkit import hookspecs
from momkit.mechanisms import builtin as builtin_mechanisms
from momkit.routing import builtin as builtin_routers
from momkit.tasks import builtin as builtin_tasks

GROUP = "momkit"
BUILTIN = "momkit"
HOOKS = {
    "mechanism": "momkit_register_mechanisms",
    "router": "momkit_register_routers",
    "task": "momkit_register_tasks",
}

# the plugin whose code is running now, while it is imported and while its hooks are called
LOADING: ContextVar[str | None] = ContextVar("momkit_loading", default=None)


class PluginError(ValueError):
    """A plugin does not keep to the hooks; the message says what it should do."""


@dataclass
class Plugin:
    """One plugin: where it comes from, what it registered, and what went wrong, if anything did.

    skipped: MOMKIT_PLUGINS leaves it out, so that it was not even imported.
    """

    name: str
    distribution: str = "unknown"
    version: str = "unknown"
    target: str = ""
    registered: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in HOOKS})
    skipped: bool = False
    error: str | None = None


def requested() -> set[str] | None:
    """The names that MOMKIT_PLUGINS asks for; None is all."""
    wanted = os.environ.get("MOMKIT_PLUGINS")
    return None if wanted is None else {part.strip() for part in wanted.split(",") if part.strip()}


def load(register: Callable[[str, type, str], None], withdraw: Callable[[str], None]) -> list[Plugin]:
    """Load the built-ins and every plugin, and pass what each offers to `register(kind, cls, owner)`.

    A plugin whose import or hook raises is recorded with its error, and what it had registered is withdrawn.
    """
    builtin = Plugin(BUILTIN, "momkit", builtin_version(), "momkit")
    for source in (builtin_mechanisms, builtin_routers, builtin_tasks):
        call_hooks(builtin, source(), register)
    plugins = [builtin]
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    for entry in entries:
        plugins.append(load_plugin(entry, register, withdraw, taken={plugin.name for plugin in plugins}))
    installed = [entry.name for entry in entries]
    for name in sorted((requested() or set()) - {BUILTIN, *installed}):
        known = ", ".join(installed) or "no plugin"
        plugins.append(Plugin(name, error=f"MOMKIT_PLUGINS asks for {name!r}, which is not installed; {known} is"))
    return plugins


def builtin_version() -> str:
    """The installed version of momkit; "source" when it is run from a folder that was never installed."""
    try:
        return metadata.version("momkit")
    except metadata.PackageNotFoundError:
        return "source"


def load_plugin(
    entry: metadata.EntryPoint,
    register: Callable[[str, type, str], None],
    withdraw: Callable[[str], None],
    taken: set[str],
) -> Plugin:
    """Import one plugin and call its hooks; whatever it raises, even SystemExit, ends up in its record."""
    plugin = Plugin(entry.name, target=entry.value)
    wanted = requested()
    if wanted is not None and entry.name not in wanted:
        plugin.skipped = True
        return plugin
    token = LOADING.set(entry.name)
    try:
        if entry.dist is not None:
            # a folder without its METADATA has neither
            plugin.distribution = entry.dist.name or "unknown"
            plugin.version = entry.dist.version or "unknown"
        if entry.name in taken:
            # its owner's name would be another's, and withdrawing the one would withdraw the other
            raise PluginError(f"the entry point {entry.name!r} of {plugin.distribution} is already taken; rename it")
        call_hooks(plugin, entry.load(), register)
    except (Exception, SystemExit) as fault:
        plugin.error = f"{type(fault).__name__}: {fault}"
        if entry.name not in taken:
            plugin.registered = {kind: [] for kind in HOOKS}
            withdraw(entry.name)
    finally:
        LOADING.reset(token)
    return plugin


def call_hooks(plugin: Plugin, source: Any, register: Callable[[str, type, str], None]) -> None:
    """Call the hooks of one source, in a manager of its own, so that its faults are its own."""
    check_hooks(source)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(source, plugin.name)
    for kind, hook in HOOKS.items():

        def register_one(cls: type, kind: str = kind) -> None:
            register(kind, cls, plugin.name)
            plugin.registered[kind].append(cls.name)  # type: ignore[attr-defined]

        getattr(manager.hook, hook)(register=register_one)


def check_hooks(source: Any) -> None:
    """Refuse what pluggy would pass over: a hook with a wrong name or without its marker, and no hook at all."""
    allowed = ", ".join(HOOKS.values())
    marked = {name for name in dir(source) if hasattr(getattr(source, name, None), f"{GROUP}_impl")}
    named = {name for name in dir(source) if name.startswith("momkit_register")}
    if wrong := sorted((marked | named) - set(HOOKS.values())):
        raise PluginError(f"{', '.join(wrong)} is no hook; allowed: {allowed}")
    if unmarked := sorted(named - marked):
        raise PluginError(f"{', '.join(unmarked)} lacks its marker; put @momkit.hookimpl on it")
    if not marked:
        raise PluginError(f"it has no hook, a function marked @momkit.hookimpl and named one of: {allowed}")
