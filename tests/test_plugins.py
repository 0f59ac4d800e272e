"""Plugins: what they register is there, and whatever one of them does wrong is its own affair."""

import importlib
import sys

import pytest

from momkit import plugins
from momkit.registry import filled_registry, registry

GOOD = """
from typing import Literal
import momkit
from momkit.mechanisms.gla import GLA, GLASpec


class Spec(GLASpec):
    kind: Literal["{name}_rule"] = "{name}_rule"


class Rule(GLA):
    Spec = Spec


@momkit.hookimpl
def momkit_register_mechanisms(register):
    register(Rule)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a plugin as an installed distribution: a module and its dist-info, in a folder on the path."""
    monkeypatch.delenv("MOMKIT_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, code, *, target=None, distribution=None, metadata=True):
        distribution = distribution or name
        module = f"momkit_test_{distribution}"
        (tmp_path / f"{module}.py").write_text(code.replace("{name}", name))
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[momkit]\n{name} = {target or module}\n")
        written.append(module)
        importlib.invalidate_caches()

    yield write
    for module in written:
        sys.modules.pop(module, None)


def load():
    """A registry filled anew, and the records of its plugins by name; the process's own stays as it is."""
    fresh = filled_registry.__wrapped__()
    return fresh, {plugin.name: plugin for plugin in fresh.plugins}


def builtins_are_whole(fresh):
    return all(fresh.owners.get((kind, name)) == "momkit" for kind, name in OWN)


OWN = [key for key, owner in registry().owners.items() if owner == "momkit"]


def test_builtins_are_one_plugin():
    first, *others = registry().plugins
    assert first.name == "momkit" and first.error is None
    assert "momkit" not in {plugin.name for plugin in others}
    assert sorted((kind, name) for kind, names in first.registered.items() for name in names) == sorted(OWN)
    assert len(first.registered["mechanism"]) == 15 and len(first.registered["router"]) == 6


def test_a_plugin_registers(install):
    install("good", GOOD)
    fresh, found = load()
    assert found["good"].error is None and not found["good"].skipped
    assert found["good"].registered == {"mechanism": ["good_rule"], "router": [], "task": []}
    assert (found["good"].distribution, found["good"].version) == ("good", "1.5")
    assert fresh.owners["mechanism", "good_rule"] == "good"
    assert builtins_are_whole(fresh)
    assert "good_rule" not in registry().names("mechanism")


HOOK = "import momkit\n@momkit.hookimpl\ndef {hook}(register):\n    {body}\n"
BROKEN = {
    "import": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    "syntax": ("def (", "SyntaxError"),
    "exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "assertion": ("assert False, 'never'", "AssertionError: never"),
    "hook raises": (GOOD + "    1 / 0\n", "ZeroDivisionError"),
    "hook exits": (GOOD + "    raise SystemExit(4)\n", "SystemExit: 4"),
    "misspelt hook": (
        HOOK.format(hook="momkit_register_mechanism", body="pass"),
        "momkit_register_mechanism is no hook; allowed: momkit_register_mechanisms, momkit_register_routers",
    ),
    "misspelt beside a good one": (
        GOOD + HOOK.format(hook="momkit_register_rooters", body="pass"),
        "momkit_register_rooters is no hook",
    ),
    "some other hook": (HOOK.format(hook="on_load", body="pass"), "on_load is no hook"),
    "no marker": ("def momkit_register_tasks(register):\n    pass", "momkit_register_tasks lacks its marker"),
    "no hook": ("x = 1", "it has no hook, a function marked @momkit.hookimpl"),
    "wrong argument": ("import momkit\n@momkit.hookimpl\ndef momkit_register_tasks(add):\n    pass", "add"),
    "no class": (HOOK.format(hook="momkit_register_routers", body="register(3)"), "registers 3 as a router"),
    "wrong kind": (
        GOOD.replace("momkit_register_mechanisms", "momkit_register_routers"),
        "as a router; it must be a subclass of Router",
    ),
    "taken by momkit": (
        GOOD.replace("{name}_rule", "gla"),
        "mechanism 'gla' is owned by momkit; broken registers it again",
    ),
    "registers at import": (
        GOOD + "\nmomkit.register(Rule)\n",
        "broken looks into the registry while it is loaded",
    ),
    "builds at import": ("import momkit\nmomkit.MoMSpec(hidden_size=8)", "looks into the registry while it is loaded"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_named_and_breaks_nothing_else(install, fault):
    code, text = BROKEN[fault]
    install("broken", code)
    install("good", GOOD)
    fresh, found = load()
    assert text in found["broken"].error
    assert found["broken"].registered == {"mechanism": [], "router": [], "task": []}
    assert "broken" not in fresh.owners.values()
    assert found["good"].error is None and "good_rule" in fresh.names("mechanism")
    assert builtins_are_whole(fresh)
    assert fresh.faults() == [f"plugin broken failed: {found['broken'].error}"]
    with pytest.raises(ValueError, match="plugin broken failed"):
        fresh.find("mechanism", "broken_rule")


@pytest.mark.parametrize("target", ["momkit_no_such_module", "momkit_test_broken:nothing", "momkit_test_broken:"])
def test_a_target_that_is_not_there(install, target):
    install("broken", GOOD, target=target)
    fresh, found = load()
    assert found["broken"].error and builtins_are_whole(fresh)


def test_a_distribution_without_metadata(install):
    install("half", GOOD, metadata=False)
    install("good", GOOD)
    fresh, found = load()
    assert (found["half"].distribution, found["half"].version) == ("unknown", "unknown")
    assert found["good"].error is None and builtins_are_whole(fresh)


def test_an_interrupt_is_no_fault(install):
    install("broken", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load()
    assert plugins.LOADING.get() is None


def test_two_plugins_of_one_rule(install):
    install("early", GOOD.replace("{name}_rule", "disputed"))
    install("later", GOOD.replace("{name}_rule", "disputed"))
    fresh, found = load()
    assert found["early"].error is None and fresh.owners["mechanism", "disputed"] == "early"
    assert "'disputed' is owned by early; later registers it again" in found["later"].error


def test_two_plugins_of_one_name(install):
    install("same", GOOD, distribution="same_a")
    install("same", GOOD.replace("{name}_rule", "other"), distribution="same_b")
    fresh, _ = load()
    first, second = (plugin for plugin in fresh.plugins if plugin.name == "same")
    assert first.error is None and fresh.owners["mechanism", "same_rule"] == "same"
    assert "the entry point 'same' of same_b is already taken" in second.error
    assert "other" not in fresh.names("mechanism")


def test_a_plugin_can_not_pass_for_momkit(install):
    install("momkit", GOOD, distribution="impostor")
    fresh, _ = load()
    assert "the entry point 'momkit' of impostor is already taken" in fresh.plugins[1].error
    assert builtins_are_whole(fresh) and "momkit_rule" not in fresh.names("mechanism")


@pytest.mark.parametrize(
    ("wanted", "loaded"),
    [("", set()), (",", set()), ("a_one", {"a_one"}), (" a_one , b_two ", {"a_one", "b_two"}), ("momkit", set())],
)
def test_momkit_plugins_chooses(install, monkeypatch, wanted, loaded):
    for name in ("a_one", "b_two"):
        install(name, GOOD)
    install("never", "raise RuntimeError('imported')")
    monkeypatch.setenv("MOMKIT_PLUGINS", wanted)
    fresh, found = load()
    assert fresh.faults() == []
    assert {name for name in ("a_one", "b_two") if f"{name}_rule" in fresh.names("mechanism")} == loaded
    assert {name for name in ("a_one", "b_two", "never") if found[name].skipped} == {"a_one", "b_two", "never"} - loaded
    assert builtins_are_whole(fresh)


def test_momkit_plugins_asks_for_what_is_not_there(install, monkeypatch):
    install("good", GOOD)
    monkeypatch.setenv("MOMKIT_PLUGINS", "good,godo")
    fresh, found = load()
    assert found["good"].error is None
    assert "MOMKIT_PLUGINS asks for 'godo', which is not installed" in found["godo"].error
    assert builtins_are_whole(fresh)
