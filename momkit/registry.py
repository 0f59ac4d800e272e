"""Names to classes: the mechanisms, routers and tasks that this process knows, and who owns each.

`registry()` is filled on first use from the built-ins and the installed plugins; `register(cls)` adds one by hand.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from collections.abc import Iterator
from functools import cache

from momkit.plugins import Plugin, load
from momkit.errors import UnknownNameError
from momkit.mechanisms.base import Mechanism
from momkit.routing.base import Router
from momkit.tasks.base import Task

BASES: dict[str, type] = {"mechanism": Mechanism, "router": Router, "task": Task}


@dataclass
class Registry:
    """Classes by kind and name, with their owners, and the plugins they came from."""

    classes: dict[str, dict[str, type]] = field(default_factory=lambda: {kind: {} for kind in BASES})
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    plugins: list[Plugin] = field(default_factory=list)

    def add(self, kind: str, cls: type, owner: str) -> None:
        """Register a class; refuses what is not of this kind, and a name that is taken, naming both owners."""
        if not (isinstance(cls, type) and issubclass(cls, BASES[kind])):
            raise TypeError(f"{owner} registers {cls!r} as a {kind}; it must be a subclass of {BASES[kind].__name__}")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not name:
            raise TypeError(f"{owner} registers {cls.__name__}, whose Spec has no default for `kind`")
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

    def find(self, kind: str, name: str) -> type:
        """The class registered under a name; an unknown one is refused with the names there are and their owners."""
        if name not in self.classes[kind]:
            known = ", ".join(f"{n} ({self.owners[kind, n]})" for n in self.names(kind))
            broken = "; ".join(f"plugin {p.name} failed: {p.error}" for p in self.plugins if p.error)
            raise UnknownNameError(f"unknown {kind} {name!r}; known: {known}" + (f"; {broken}" if broken else ""))
        return self.classes[kind][name]


@cache
def registry() -> Registry:
    """The one registry of this process."""
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


@contextmanager
def temporarily(*classes: type) -> Iterator[None]:
    """Register classes for the length of a `with` block; for tests and notebooks."""
    owner = "temporary"
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
