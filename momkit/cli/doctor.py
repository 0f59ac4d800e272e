"""`momkit doctor`: versions, devices, backends and plugins, and what is wrong with them."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
import typer

from momkit import MoMSpec, __version__
from momkit.cli.console import JsonFlag, emit, print_table, stdout
from momkit.decode import why_no_kernel
from momkit.errors import InputError
from momkit.mechanisms.gated_deltanet import GatedDeltaNet, GatedDeltaNetSpec
from momkit.mechanisms.generated_scan import why_not_generated
from momkit.mechanisms.triton_scan import family_of, why_not_triton
from momkit.plugins import Plugin
from momkit.registry import registry
from momkit.scan import as_mechanism


def installed(package: str) -> str | None:
    """The version of an installed package; nothing is imported for it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """What momkit runs on, None for what is not there."""
    found = {name: installed(name) for name in ("torch", "triton", "numpy", "pydantic", "pluggy")}
    return {"momkit": __version__, "python": platform.python_version(), **found}


def missing_requirements() -> list[str]:
    """Packages that momkit declares for every platform and that are not installed."""
    try:
        declared = metadata.requires("momkit") or []
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in declared if ";" not in line]
    return [f"{name} is required and not installed" for name in names if installed(name) is None]


def devices() -> list[dict[str, str]]:
    """The devices torch can compute on."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = [{"name": "cpu", "description": cpu}]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        found.append({"name": f"cuda:{index}", "description": text})
    return found


def backends(rules: Sequence[str]) -> list[dict[str, Any]]:
    """Every backend, whether it can run here, and which rules it serves or why it can't run."""
    found = [
        {"name": "reference", "available": True, "reason": "the rule's one step in plain torch: any rule, any device"},
        {"name": "chunked", "available": True, "reason": "matmul form in plain torch: affine rules, any device"},
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rule = GatedDeltaNet(GatedDeltaNetSpec())
    fault, other = why_not_triton(rule, device), why_not_generated(rule, device)
    generated = "kernels made from a rule's step, where no family's serves it"
    return [
        *found,
        {"name": "triton", "available": fault is None, "reason": fault or served(rules, device)},
        {"name": "generated", "available": other is None, "reason": other or generated},
    ]


def served(rules: Sequence[str], device: torch.device) -> str:
    """Which rules each family of fused kernels serves."""
    families: dict[str, list[str]] = {}
    for name in rules:
        rule = as_mechanism(name)
        try:
            structures = rule.structures()
        except InputError:  # a rule whose structure is to be found from its step, and can't be
            families.setdefault("no structure found", []).append(name)
            continue
        if why_not_triton(rule, device) is None:
            family = " and ".join(sorted({str(family_of(structure)) for structure in structures})) or "its own"
            families.setdefault(family, []).append(name)
        if why_no_kernel(rule, device, torch.float32, None) is None:
            families.setdefault("decode", []).append(name)
    return "fused kernels; " + "; ".join(f"{family}: {', '.join(names)}" for family, names in families.items())


def status(plugin: Plugin) -> str:
    """What became of a plugin."""
    if plugin.error:
        return "failed"
    return "left out by MOMKIT_PLUGINS" if plugin.skipped else "loaded"


def self_test() -> str | None:
    """What goes wrong when a small block takes three tokens; None when nothing does."""
    try:
        block = MoMSpec(hidden_size=8).build()
        out = block(torch.ones(1, 3, 8)).hidden_states
        return None if bool(out.isfinite().all()) else "a block's output is not finite"
    except Exception as fault:  # whatever is broken is what is asked for
        return f"{type(fault).__name__}: {fault}"


def doctor(as_json: JsonFlag = False) -> None:
    """Report versions, devices, backends and plugins; exit code 1 if something that momkit needs is broken."""
    problems = missing_requirements()
    plugins: list[Plugin] = []
    rules: list[str] = []
    try:
        plugins, rules = registry().plugins, registry().names("mechanism")
    except Exception as fault:  # the built-ins are broken: the report must still come
        problems.append(f"built-ins can't be loaded: {type(fault).__name__}: {fault}")
    else:
        if fault_text := self_test():
            problems.append(f"a block can't run: {fault_text}")
    document = {
        "ok": not problems,
        "problems": problems,
        "versions": versions(),
        "devices": devices(),
        "backends": backends(rules),
        "plugins": [asdict(plugin) | {"status": status(plugin)} for plugin in plugins],
    }
    if as_json:
        emit(document)
    else:
        print_report(document)
    raise typer.Exit(0 if document["ok"] else 1)


def print_report(document: dict[str, Any]) -> None:
    """The report on a terminal."""
    console = stdout()
    versions = ((name, version or "not installed") for name, version in document["versions"].items())
    print_table(console, "versions", ("package", "version"), versions)
    print_table(console, "devices", ("device", "description"), ([*d.values()] for d in document["devices"]))
    backends = ((b["name"], "yes" if b["available"] else "no", b["reason"]) for b in document["backends"])
    print_table(console, "backends", ("backend", "available", "reason"), backends)
    plugins = (
        (p["name"], f"{p['distribution']} {p['version']}", p["status"], p["error"] or registers(p["registered"]))
        for p in document["plugins"]
    )
    print_table(console, "plugins", ("plugin", "from", "status", "registers, or what is wrong"), plugins)
    for problem in document["problems"]:
        console.print(f"broken: {problem}")
    console.print("momkit works" if document["ok"] else "momkit does not work here")


def registers(registered: dict[str, list[str]]) -> str:
    """How many of each kind a plugin brings."""
    return ", ".join(f"{len(names)} {kind}s" for kind, names in registered.items() if names) or "nothing"
