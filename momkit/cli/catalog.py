"""`momkit list`: every rule, router and task, and the plugins that could not be loaded."""

import re
from typing import Any

from momkit.cli.console import JsonFlag, emit, print_table, stdout
from momkit.registry import Registry, registry

PLURALS = {"mechanism": "mechanisms", "router": "routers", "task": "tasks"}


def describe(cls: type) -> dict[str, str]:
    """The three paragraphs of a registered class's docstring: its sentence, its equation or example, its source."""
    text = re.split(r"\n\s*\n", (cls.__doc__ or "").strip())
    parts = [re.sub(r"\n\s+", "\n", part).strip() for part in [*text, "", ""][:3]]
    return {"summary": " ".join(parts[0].split()), "equation": parts[1], "paper": " ".join(parts[2].split())}


def entry(found: Registry, kind: str, name: str) -> dict[str, str]:
    """One line of the list."""
    text = describe(found.classes[kind][name])
    # the list has room for the first paper's number; `show` has the whole text
    number = re.search(r"arXiv \d{4}\.\d{5}", text["paper"])
    paper = number.group() if number else text["paper"].split(". ")[0]
    return {"name": name, "owner": found.owners[kind, name], "summary": text["summary"], "paper": paper}


def list_command(as_json: JsonFlag = False) -> None:
    """List every update rule, router and task with its owner, what it does and where it comes from."""
    found = registry()
    document: dict[str, Any] = {
        plural: [entry(found, kind, name) for name in found.names(kind)] for kind, plural in PLURALS.items()
    }
    document["broken_plugins"] = [{"name": p.name, "error": p.error} for p in found.plugins if p.error]
    if as_json:
        emit(document)
        return
    console = stdout()
    for plural in PLURALS.values():
        rows = (tuple(row.values()) for row in document[plural])
        print_table(console, plural, ("name", "owner", "summary", "paper"), rows)
    for fault in found.faults():
        console.print(fault)
