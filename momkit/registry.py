"""Names to classes: the mechanisms, routers and tasks that this process knows, and who owns each.

`registry()` is filled on first use from the built-ins and the installed plugins; `register(cls)` adds one by hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

from pydantic import BaseModel

from momkit.errors import UnknownNameError
from momkit.mechanisms.base import Mechanism, MechanismSpec
from momkit.plugins import LOADING, Plugin, PluginError, load
from momkit.routing.base import Router, RouterSpec
from momkit.tasks.base import Task, TaskSpec

BASES: dict[str, type] = {"mechanism": Mechanism, "router": Router, "task": Task}
SPEC_BASES: dict[str, type[BaseModel]] = {"mechanism": MechanismSpec, "router": RouterSpec, "task": TaskSpec}


@dataclass
class Registry:
    """Classes by kind and name, with their owners, and the plugins they came from."""

    classes: dict[str, dict[str, type]] = field(default_factory=lambda: {kind: {} for kind in BASES})
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    plugins: list[Plugin] = field(default_factory=list)

    def add(self, kind: str, cls: type, owner: str) -> None:
        """Register a class; refuses what is not of this kind, and a name that is taken, naming both owners."""
        name = check_class(kind, cls, owner)
        if name in self.classes[kind]:
            raise ValueError(f"{kind} {name!r} is owned by {self.owners[kind, name]}; {owner} registers it again")
        self.classes[kind][name] = cls
        self.owners[kind, name] = owner

    def withdraw(self, owner: str) -> None:
        """Forget everything that `owner` registered."""
        for kind, name in [key for key, value in self.owners.items() if value == owner]:
            del self.classes[kind][name], self.owners[kind, name]

    def names(self, kind: str) -> list[str]:
        return sorted(self.classes[kind])

    def faults(self) -> list[str]:
        """What is wrong with the plugins, one sentence for each broken one."""
        return [f"plugin {plugin.name} failed: {plugin.error}" for plugin in self.plugins if plugin.error]

    def find(self, kind: str, name: str) -> type:
        """The class registered under a name; an unknown one is refused with the names there are and their owners."""
        if name not in self.classes[kind]:
            known = ", ".join(f"{n} ({self.owners[kind, n]})" for n in self.names(kind))
            raise UnknownNameError("; ".join([f"unknown {kind} {name!r}; known: {known}", *self.faults()]))
        return self.classes[kind][name]


def check_class(kind: str, cls: type, owner: str) -> str:
    """The name of a class that may be registered as `kind`; a TypeError says what is wrong with any other."""
    if not (isinstance(cls, type) and issubclass(cls, BASES[kind])):
        raise TypeError(f"{owner} registers {cls!r} as a {kind}; it must be a subclass of {BASES[kind].__name__}")
    spec: Any = getattr(cls, "Spec", None)
    if not (isinstance(spec, type) and issubclass(spec, SPEC_BASES[kind])):
        base = SPEC_BASES[kind].__name__
        raise TypeError(f"{owner} registers {cls.__name__}, whose Spec is {spec!r}; it must be a subclass of {base}")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"{owner} registers {cls.__name__}, whose Spec must default `kind` to its name, got {name!r}")
    if required := [key for key, info in spec.model_fields.items() if info.is_required()]:
        raise TypeError(f"{owner} registers {cls.__name__}, whose Spec has no default for {', '.join(required)}")
    return name


def registry() -> Registry:
    """The one registry of this process."""
    if (plugin := LOADING.get()) is not None:
        raise PluginError(f"{plugin} looks into the registry while it is loaded; it may register in its hooks alone")
    return filled_registry()


@cache
def filled_registry() -> Registry:
    """A registry with the built-ins and every plugin."""
    filled = Registry()
    filled.plugins = load(filled.add, filled.withdraw)
    return filled


def register(cls: type, owner: str = "this program") -> type:
    """Register a mechanism, router or task by hand; usable as a decorator."""
    for kind, base in BASES.items():
        if isinstance(cls, type) and issubclass(cls, base):
            registry().add(kind, cls, owner)
            return cls
    raise TypeError(f"register takes a subclass of Mechanism, Router or Task, got {cls!r}")


_blocks = count(1)


@contextmanager
def temporarily(*classes: type) -> Iterator[None]:
    """Register classes for the length of a `with` block; for tests and notebooks."""
    owner = f"temporary {next(_blocks)}"  # one owner a block, so that an inner block takes nothing from an outer one
    try:
        for cls in classes:
            register(cls, owner)
        yield
    finally:
        registry().withdraw(owner)


def find_mechanism(name: str) -> type[Mechanism]:
    """The mechanism class registered as `name`."""
    return registry().find("mechanism", name)


def find_router(name: str) -> type[Router]:
    """The router class registered as `name`."""
    return registry().find("router", name)


def find_task(name: str) -> type[Task]:
    """The task class registered as `name`."""
    return registry().find("task", name)
