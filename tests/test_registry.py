"""The registry: what may enter, under which name, and how one that is not there is refused."""

from typing import Literal

import pytest

from momkit import Mechanism, MoMSpec, Router, RouterSpec, register, scan
from momkit.errors import UnknownNameError
from momkit.mechanisms.base import MechanismSpec
from momkit.mechanisms.gla import GLA, GLASpec
from momkit.registry import Registry, find_mechanism, find_router, find_task, registry, temporarily
from momkit.tasks.base import Task


class RuleSpec(GLASpec):
    kind: Literal["test_rule"] = "test_rule"


class Rule(GLA):
    Spec = RuleSpec


class OtherSpec(GLASpec):
    kind: Literal["test_other"] = "test_other"


class Other(GLA):
    Spec = OtherSpec


class NamelessSpec(MechanismSpec):
    pass


class Nameless(Mechanism):
    Spec = NamelessSpec


class NeedySpec(MechanismSpec):
    kind: Literal["needy"] = "needy"
    channels: int


class Needy(Mechanism):
    Spec = NeedySpec


class OddSpec(MechanismSpec):
    kind: Literal["odd name"] = "odd name"


class Odd(Mechanism):
    Spec = OddSpec


class SwappedSpec(RouterSpec):
    kind: Literal["swapped"] = "swapped"


class Swapped(Mechanism):
    Spec = SwappedSpec


class Bare(Router):
    pass


@pytest.mark.parametrize(
    ("kind", "find"), [("mechanism", find_mechanism), ("router", find_router), ("task", find_task)]
)
def test_an_unknown_name_lists_those_there_are_and_their_owners(kind, find):
    with pytest.raises(UnknownNameError) as refused:
        find("nothing")
    assert f"unknown {kind} 'nothing'; known: " in str(refused.value)
    for name in registry().names(kind):
        assert f"{name} ({registry().owners[kind, name]})" in str(refused.value)
        assert find(name).name == name


def test_register_is_a_decorator():
    try:
        assert register(Rule) is Rule
        assert find_mechanism("test_rule") is Rule
        assert registry().owners["mechanism", "test_rule"] == "this program"
        assert MoMSpec(hidden_size=8, mechanism="test_rule").build().mechanism.name == "test_rule"
        with pytest.raises(ValueError, match="'test_rule' is owned by this program; elsewhere registers it again"):
            register(Rule, "elsewhere")
    finally:
        registry().withdraw("this program")
    assert "test_rule" not in registry().names("mechanism")


def test_blocks_of_temporary_classes_nest():
    with temporarily(Rule):
        with temporarily(Other):
            assert {"test_rule", "test_other"} <= set(registry().names("mechanism"))
        assert "test_rule" in registry().names("mechanism")
        assert "test_other" not in registry().names("mechanism")
        with pytest.raises(ValueError, match="registers it again"), temporarily(Other, Rule):
            pass
        assert find_mechanism("test_rule") is Rule
        assert "test_other" not in registry().names("mechanism")
    assert "test_rule" not in registry().names("mechanism")
    with pytest.raises(UnknownNameError):
        scan("test_rule", {})


@pytest.mark.parametrize(
    ("kind", "cls", "text"),
    [
        ("mechanism", 3, "registers 3 as a mechanism; it must be a subclass of Mechanism"),
        ("mechanism", Bare, "as a mechanism; it must be a subclass of Mechanism"),
        ("router", Rule, "as a router; it must be a subclass of Router"),
        ("task", Rule, "as a task; it must be a subclass of Task"),
        ("router", Bare, "Bare, whose Spec is None; it must be a subclass of RouterSpec"),
        ("mechanism", Swapped, "whose Spec is .*SwappedSpec.*; it must be a subclass of MechanismSpec"),
        ("mechanism", Nameless, "Nameless, whose Spec must default `kind` to its name"),
        ("mechanism", Odd, "must default `kind` to its name, got 'odd name'"),
        ("mechanism", Needy, "Needy, whose Spec has no default for channels"),
    ],
)
def test_what_may_not_enter(kind, cls, text):
    empty = Registry()
    with pytest.raises(TypeError, match=f"somebody registers .*{text}" if cls != 3 else f"somebody {text}"):
        empty.add(kind, cls, "somebody")
    assert empty.names(kind) == [] and empty.owners == {}


@pytest.mark.parametrize("cls", [3, int, None, RuleSpec])
def test_register_refuses_what_is_of_no_kind(cls):
    with pytest.raises(TypeError, match="register takes a subclass of Mechanism, Router or Task"):
        register(cls)


def test_withdraw_takes_one_owner_only():
    mixed = Registry()
    mixed.add("mechanism", Rule, "one")
    mixed.add("mechanism", Other, "two")
    mixed.withdraw("one")
    assert mixed.names("mechanism") == ["test_other"] and mixed.owners == {("mechanism", "test_other"): "two"}


def test_names_of_different_kinds_do_not_clash():
    class SharedSpec(RouterSpec):
        kind: Literal["test_rule"] = "test_rule"

    class Shared(Router):
        Spec = SharedSpec

    mixed = Registry()
    mixed.add("mechanism", Rule, "one")
    mixed.add("router", Shared, "two")
    assert mixed.find("mechanism", "test_rule") is Rule and mixed.find("router", "test_rule") is Shared


def test_every_task_is_a_task():
    assert all(issubclass(find_task(name), Task) for name in registry().names("task"))
