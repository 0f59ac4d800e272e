"""Commands that report: what they print, in which form, and how they end."""

import json
from dataclasses import asdict

import pytest

from momkit import MoMSpec, __version__
from momkit.accounting import measure
from momkit.cli import doctor
from momkit.plugins import Plugin
from momkit.registry import filled_registry, registry

KINDS = {"mechanism": "mechanisms", "router": "routers", "task": "tasks"}
COMMANDS = ["doctor", "list", "show", "schema", "validate", "check", "train", "generate", "demo", "bench", "new"]
NAMES = [(kind, name) for kind in KINDS for name in registry().names(kind)]


def document(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_version_and_help(momkit):
    assert momkit("--version").stdout.strip() == f"momkit {__version__}"
    for args in ((), ("--help",)):
        help_text = momkit(*args)
        assert help_text.exit_code == 0
        for command in COMMANDS:
            assert command in help_text.stdout


def test_doctor_reports_what_there_is(momkit):
    found = document(momkit("doctor", "--json"))
    assert found["ok"] and found["problems"] == []
    assert found["versions"]["momkit"] == __version__
    assert {"python", "torch", "triton"} <= set(found["versions"])
    assert found["devices"][0]["name"] == "cpu"
    by_name = {backend["name"]: backend for backend in found["backends"]}
    assert by_name["reference"]["available"] and by_name["chunked"]["available"]
    assert all(backend["reason"] for backend in found["backends"])
    builtin = found["plugins"][0]
    assert builtin["name"] == "momkit" and builtin["status"] == "loaded"
    assert sorted(builtin["registered"]["mechanism"]) == [
        name for name in registry().names("mechanism") if registry().owners["mechanism", name] == "momkit"
    ]


def test_doctor_fails_when_momkit_is_broken(momkit, monkeypatch):
    monkeypatch.setattr(doctor, "missing_requirements", lambda: ["numpy is required and not installed"])
    result = momkit("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"] == ["numpy is required and not installed"]
    text = momkit("doctor")
    assert text.exit_code == 1 and "numpy is required" in text.stdout


def test_doctor_still_reports_when_the_builtins_are_broken(momkit, monkeypatch):
    def broken(self, register):
        raise ImportError("no such rule")

    monkeypatch.setattr("momkit.mechanisms.builtin.momkit_register_mechanisms", broken_hook(broken))
    filled_registry.cache_clear()
    try:
        result = momkit("doctor", "--json")
        assert result.exit_code == 1
        assert "no such rule" in json.loads(result.stdout)["problems"][0]
    finally:
        monkeypatch.undo()
        filled_registry.cache_clear()


def broken_hook(function):
    from momkit import hookimpl

    function.__name__ = "momkit_register_mechanisms"
    return hookimpl(function)


def test_doctor_sees_a_missing_requirement(monkeypatch):
    assert doctor.missing_requirements() == []
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["no-such-package>=1", "other; extra == 'dev'"])
    assert doctor.missing_requirements() == ["no-such-package is required and not installed"]


def test_list_names_everything(momkit):
    found = document(momkit("list", "--json"))
    text = momkit("list").stdout
    for kind, plural in KINDS.items():
        assert [row["name"] for row in found[plural]] == registry().names(kind)
        for row in found[plural]:
            assert row["owner"] and row["name"] in text
            assert row["summary"].endswith(".") and "\n" not in row["summary"], row
    assert all(row["paper"] for plural in ("mechanisms", "routers") for row in found[plural])
    assert found["broken_plugins"] == []


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_show_name(momkit, kind, name):
    found = document(momkit("show", name, "--json"))
    assert (found["kind"], found["name"]) == (kind, name)
    assert found["summary"]
    text = momkit("show", name).stdout
    assert name in text and found["equation"].splitlines()[0] in text
    if kind == "mechanism":
        assert {"inputs", "state", "output", "structure", "backend"} <= set(found)
        assert all(facts["axes"] for facts in found["inputs"].values())
        assert found["backend"]["reason"]


def test_show_tells_kinds_of_one_name_apart(momkit, monkeypatch):
    classes = registry().classes
    monkeypatch.setitem(classes["router"], "gla", classes["router"]["dense"])
    monkeypatch.setitem(registry().owners, ("router", "gla"), "somebody")
    result = momkit("show", "gla")
    assert result.exit_code == 2 and "'gla' is a mechanism and a router; say which with --kind" in result.stderr
    assert document(momkit("show", "gla", "--kind", "router", "--json"))["owner"] == "somebody"


def test_show_spec(momkit, tmp_path):
    path = tmp_path / "block.yaml"
    path.write_text(
        "hidden_size: 32\nmechanism: {kind: gla, num_heads: 2, head_dim: 8}\nrouter: {kind: hash, top_k: 1}\n"
    )
    found = document(momkit("show", path, "--json"))
    spec = MoMSpec.from_yaml(path.read_text())
    costs = measure(spec)
    assert found["parameters"] == asdict(costs.parameters)
    assert found["state_bytes"] == asdict(costs.state_bytes)
    assert found["flops_per_token"].pop("total") == sum(found["flops_per_token"].values())
    assert found["flops_per_token"] == costs.flops_per_token
    block = spec.build()
    assert found["shapes"]["parameters"] == {name: list(p.shape) for name, p in block.named_parameters()}
    assert found["shapes"]["recurrent"] == {"S": [5, 2, 8, 8]}
    assert found["spec"] == spec.model_dump(mode="json")
    text = momkit("show", path).stdout
    assert f"{costs.parameters.total:,}" in text and "[5, 2, 8, 8]" in text


@pytest.mark.parametrize("kind", ["mom", "lm", "train"])
def test_schema_is_json(momkit, kind):
    found = document(momkit("schema", kind))
    assert found["type"] == "object" and found["additionalProperties"] is False


def test_schema_of_a_block_names_every_rule(momkit):
    found = document(momkit("schema"))
    assert found["properties"]["mechanism"]["anyOf"][0]["enum"] == registry().names("mechanism")


GOOD = {
    "mom": "hidden_size: 16",
    "lm": "{hidden_size: 16, vocab_size: 8, block: {mechanism: gla}}",
    "train": "{model: {hidden_size: 16, block: {}}, task: mqar}",
}


@pytest.mark.parametrize("kind", GOOD)
def test_validate_tells_kinds_apart(momkit, tmp_path, kind):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD[kind])
    found = document(momkit("validate", path, "--json"))
    assert found == {"ok": True, "files": [{"path": str(path), "ok": True, "kind": kind, "error": None}]}
    assert momkit("validate", path).stdout == f"{path}: ok ({kind})\n"
    assert momkit("validate", path, "--kind", kind).exit_code == 0


BAD = {
    "hidden_size: 0": "hidden_size = 0",
    "{hidden_size: 8, colour: red}": "colour = 'red'",
    "{hidden_size: 8, mechanism: glaa}": "unknown mechanism 'glaa'; known: ",
    "{hidden_size: 8, mechanism: {kind: gla, num_heads: -1}}": "mechanism.num_heads = -1",
    "{hidden_size: 8, num_memories: 2, router: {kind: softmax_topk, top_k: 3}}": "router.top_k = 3",
    "{hidden_size: 8, conv_size: 0}": "conv_size = 0",
    "num_memories: 2": "hidden_size",
    "": "should be",
    "[1, 2": "not YAML",
    "{model: {hidden_size: 8, block: {}}, task: nim}": "unknown task 'nim'",
}


@pytest.mark.parametrize("text", BAD)
def test_validate_refuses_in_one_line(momkit, tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = momkit("validate", path)
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert str(path) in result.stderr and BAD[text] in result.stderr


def test_validate_goes_on_after_a_bad_file(momkit, tmp_path):
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_bytes(b"\xff\xfe\x00")
    good.write_text("hidden_size: 8")
    missing = tmp_path / "missing.yaml"
    result = momkit("validate", bad, good, missing, "--json")
    assert result.exit_code == 2
    assert [found["ok"] for found in json.loads(result.stdout)["files"]] == [False, True, False]
    assert len(result.stderr.splitlines()) == 2


FAULTS = {
    ("lisst",): "No such command 'lisst'",
    ("list", "--yaml"): "--yaml",
    ("show",): "Missing argument",
    ("show", "gated_deltane"): "did you mean gated_deltanet",
    ("show", "xyz"): "'xyz' is no rule, router or task; known: ",
    ("show", "gla", "--kind", "router"): "'gla' is no router",
    ("show", "nowhere.yaml"): "nowhere.yaml: No such file or directory",
    ("show", "./"): "Is a directory",
    ("schema", "nothing"): "'nothing'",
    ("validate",): "Missing argument",
    ("new",): "Missing command",
    ("new", "mechanism"): "Missing argument",
}


@pytest.mark.parametrize("args", FAULTS, ids=" ".join)
@pytest.mark.parametrize("as_json", [False, True])
def test_user_faults_are_one_line(momkit, args, as_json):
    with_json = as_json and args[0] in ("list", "show") and args != ("show",)
    result = momkit(*args, *(["--json"] if with_json else []))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("momkit: ") and FAULTS[args] in result.stderr


def test_show_refuses_what_is_no_block(momkit, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD["train"])
    result = momkit("show", path)
    assert result.exit_code == 2 and "show takes the spec of a block" in result.stderr


def test_a_bug_is_no_user_fault(momkit, monkeypatch):
    def broken():
        raise ValueError("a bug")

    monkeypatch.setattr("momkit.cli.catalog.registry", broken)
    result = momkit("list")
    assert result.exit_code == 1 and isinstance(result.exception, ValueError)


def test_plugins_and_their_faults_are_shown(momkit, monkeypatch):
    broken = Plugin("broken", "some-package", "2.0", error="ImportError: no [brackets]")
    idle = Plugin("idle", "other-package", "3.0", skipped=True)
    monkeypatch.setattr(registry(), "plugins", [*registry().plugins, broken, idle])
    found = document(momkit("doctor", "--json"))
    assert [(p["name"], p["status"]) for p in found["plugins"][-2:]] == [
        ("broken", "failed"),
        ("idle", "left out by MOMKIT_PLUGINS"),
    ]
    assert document(momkit("list", "--json"))["broken_plugins"] == [{"name": "broken", "error": broken.error}]
    assert "plugin broken failed: ImportError: no [brackets]" in momkit("list").stdout
    assert "some-package 2.0" in momkit("doctor").stdout
