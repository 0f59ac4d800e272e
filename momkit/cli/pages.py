"""How `momkit show` looks on a terminal."""

from typing import Any

from rich.console import Console

from momkit.cli.console import stdout, table


def print_name(document: dict[str, Any]) -> None:
    """A rule, router or task."""
    console = stdout()
    console.print(f"{document['name']}: {document['kind']} of {document['owner']}", style="bold")
    for part in ("summary", "equation", "paper"):
        if document[part]:
            console.print(document[part], "", sep="\n", soft_wrap=True)
    if document["kind"] == "mechanism":
        print_mechanism(console, document)
    if document["fields"]:
        rows = table("settings", "field", "default")
        for name, value in document["fields"].items():
            rows.add_row(name, "left to the sizes" if value is None else str(value))
        console.print(rows)


def print_mechanism(console: Console, document: dict[str, Any]) -> None:
    """What only rules have."""
    rows = table("inputs", "name", "shape", "values")
    for name, facts in document["inputs"].items():
        rows.add_row(name, shape(facts["axes"]), values(facts))
    console.print(rows, "")
    rows = table("state of a segment, and output", "name", "shape")
    for name, axes in document["state"].items():
        rows.add_row(name, shape(axes))
    rows.add_row("output", shape(document["output"]))
    console.print(rows, "")
    structure = document["structure"] or {"none": "only the step is stated"}
    console.print("structure:", ", ".join(f"{name} {value}" for name, value in structure.items()))
    console.print(f"backend: {document['backend']['backend']}, since {document['backend']['reason']}", "", sep="\n")


def print_spec(document: dict[str, Any]) -> None:
    """A block's costs and shapes."""
    console = stdout()
    spec = document["spec"]
    console.print(f"{spec['mechanism']['kind']} block routed by {spec['router']['kind']}", style="bold")
    rows = table("costs", "", "total", "active for a token")
    rows.add_row("parameters", *(f"{document['parameters'][part]:,}" for part in ("total", "active")))
    rows.add_row("bytes of state a sequence", *(f"{document['state_bytes'][part]:,}" for part in ("total", "active")))
    console.print(rows, "")
    rows = table("floating point operations a token, forward, an estimate", "part", "operations")
    for part, flops in document["flops_per_token"].items():
        rows.add_row(part, f"{flops:,}")
    console.print(rows, "")
    for part, title in (("parameters", "parameters"), ("recurrent", "state: memories"), ("conv", "state: convolutions")):
        rows = table(title, "name", "shape")
        for name, sizes in document["shapes"][part].items():
            rows.add_row(name, shape(sizes))
        console.print(rows, "")
    for name, choice in document["backends"].items():
        console.print(f"{name}: {choice['backend']}, since {choice['reason']}")


def shape(sizes: list[Any]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"


def values(facts: dict[str, Any]) -> str:
    """The range of an input, in words."""
    low, high = facts["low"], facts["high"]
    if facts["unit_norm"]:
        return "of norm one"
    if low is None and high is None:
        return "any"
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
