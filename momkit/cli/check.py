"""`momkit check`: run the conformance checks of a rule or router, or of everything registered."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from momkit.cli.console import JsonFlag, emit, print_table, stdout
from momkit.errors import InputError
from momkit.registry import registry

if TYPE_CHECKING:
    from momkit.testing.suite import BoundCheck, CheckResult


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Rules and routers, with options as in 'gla(num_heads=3)'; dispatch for what lies around them."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Check everything registered.")] = False,
    only: Annotated[str, typer.Option(help="Only checks whose id contains this.")] = "",
    backend: Annotated[str | None, typer.Option(help="The backend to check rules on; default: all that can.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda: where scans are checked; default: cpu.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="The number of examples: ci, dev, full; interpret, cuda for kernels; default: dev."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run property tests of rules and routers; exit code 1 if one fails."""
    if bool(names) == everything:
        raise InputError("check takes names, or --all")
    if profile is not None:
        os.environ["MOMKIT_PROFILE"] = profile
    if device is not None:
        os.environ["MOMKIT_DEVICE"] = device
    if everything:
        names = ["dispatch", *registry().names("router"), *registry().names("mechanism")]
    chosen = [bound for bound in find_checks(names or [], backend) if only in bound.id]
    if not chosen:
        raise InputError(f"only = {only!r} is in no check's id")
    results = run_all(chosen, quiet=as_json)
    if as_json:
        passed = all(result.ok for result in results)
        emit({"passed": passed, "checks": [asdict(result) for result in results]})
    else:
        report(results)
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def find_checks(names: list[str], backend: str | None) -> list["BoundCheck"]:
    """The checks of what is named; the kit's own dependency is an extra, so that it may be missing."""
    try:
        from momkit.testing.profiles import current_profile
        from momkit.testing.suite import bound_checks
    except ModuleNotFoundError as fault:
        raise InputError(f"{fault.name} is not installed; momkit check needs the extra momkit[testing]") from fault
    current_profile()
    return [bound for bound, _ in bound_checks(names, backend=backend)]  # type: ignore[arg-type]


def run_all(chosen: list["BoundCheck"], quiet: bool) -> list["CheckResult"]:
    """Run checks, saying on stderr which one is at work."""
    from momkit.testing.suite import run_check

    results = []
    with Console(stderr=True, quiet=quiet).status("") as status:
        for number, bound in enumerate(chosen, 1):
            status.update(f"{number}/{len(chosen)} {bound.id}")
            results.append(run_check(bound))
    return results


def report(results: list["CheckResult"]) -> None:
    """A table with a line for each subject, then every failure at length."""
    console = stdout()
    by_subject: dict[str, list[CheckResult]] = {}
    for result in results:
        by_subject.setdefault(result.id.rpartition("-")[0], []).append(result)
    rows = [
        (subject, str(sum(r.ok for r in mine)), str(sum(not r.ok for r in mine)), f"{sum(r.seconds for r in mine):.1f}")
        for subject, mine in by_subject.items()
    ]
    print_table(console, "conformance", ("subject", "passed", "failed", "seconds"), rows)
    for result in results:
        if not result.ok:
            console.print(f"{result.id}: {result.status}", style="bold")
            console.print(result.message, "")
    failed = sum(not result.ok for result in results)
    console.print(f"{len(results)} checks, {failed} failed")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(check)
