"""How `momkit show` looks on a terminal."""

from typing import Any

from rich.console import Console

from momkit.cli.console import print_table, stdout


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
        fields = ((name, "not set" if value is None else str(value)) for name, value in document["fields"].items())
        print_table(console, "settings", ("field", "default"), fields)


def print_mechanism(console: Console, document: dict[str, Any]) -> None:
    """What only rules have."""
    inputs = ((name, shape(facts["axes"]), values(facts)) for name, facts in document["inputs"].items())
    print_table(console, "inputs", ("name", "shape", "values"), inputs)
    states = document["state"] | {"output": document["output"]}
    rows = ((name, shape(axes)) for name, axes in states.items())
    print_table(console, "state of a segment, and output", ("name", "shape"), rows)
    structure = document["structure"] or {"none": "only the step is stated"}
    console.print("structure:", ", ".join(f"{name} {value}" for name, value in structure.items()))
    console.print(f"step: {document['step']['verdict']}", soft_wrap=True)
    console.print(f"backend: {document['backend']['backend']}, since {document['backend']['reason']}", "", sep="\n")


def print_spec(document: dict[str, Any]) -> None:
    """A block's costs and shapes."""
    console = stdout()
    spec = document["spec"]
    console.print(f"{spec['mechanism']['kind']} block routed by {spec['router']['kind']}", "", sep="\n")
    costs = {"parameters": document["parameters"], "bytes of state a sequence": document["state_bytes"]}
    rows = ((name, f"{count['total']:,}", f"{count['active']:,}") for name, count in costs.items())
    print_table(console, "costs", ("", "total", "active for a token"), rows)
    flops = ((part, f"{number:,}") for part, number in document["flops_per_token"].items())
    print_table(console, "floating point operations a token, forward, an estimate", ("part", "operations"), flops)
    for part, title in (
        ("parameters", "parameters"),
        ("recurrent", "state: memories"),
        ("conv", "state: convolutions"),
    ):
        shapes = ((name, shape(sizes)) for name, sizes in document["shapes"][part].items())
        print_table(console, title, ("name", "shape"), shapes)
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
