"""`momkit check`: exit codes, JSON, and what it refuses."""

import json

import pytest
import typer
from typer.testing import CliRunner

from momkit.cli import check as command
from momkit.cli.main import make_app
from momkit.mechanisms.gated_deltanet import GatedDeltaNet

DOCUMENTED = ["check", "gated_deltanet", "--only", "gated_deltanet-check_documented"]


@pytest.fixture(autouse=True)
def profile(monkeypatch):
    # both are set by options of the command, too, so that they are put back
    monkeypatch.setenv("MOMKIT_PROFILE", "mutants")
    monkeypatch.setenv("MOMKIT_DEVICE", "cpu")


def run(*arguments):
    return CliRunner().invoke(make_app(["check", "info"]), list(arguments), env={"COLUMNS": "200"})


def test_passes():
    done = run(*DOCUMENTED)
    assert done.exit_code == 0, done.output
    assert "1 checks, 0 failed" in done.stdout


def test_json_is_one_document():
    done = run(*DOCUMENTED, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["passed"] is True
    (result,) = document["checks"]
    assert result["id"] == "gated_deltanet-check_documented"
    assert result["status"] == "passed"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_failed_check_is_exit_code_one(monkeypatch, flags):
    monkeypatch.setattr(GatedDeltaNet, "__doc__", "No equation.")
    done = run(*DOCUMENTED, *flags)
    assert done.exit_code == 1, done.output
    assert "the docstring has no equation" in done.stdout
    if flags:
        assert json.loads(done.stdout)["passed"] is False


def test_several_names_and_a_backend():
    done = run("check", "gla", "deltanet", "--only", "check_shapes", "--backend", "chunked", "--json")
    assert [result["id"] for result in json.loads(done.stdout)["checks"]] == [
        "gla-chunked-check_shapes_and_dtypes",
        "deltanet-chunked-check_shapes_and_dtypes",
    ]


def test_all_covers_everything_registered():
    done = run("check", "--all", "--only", "check_documented", "--json")
    ids = {result["id"] for result in json.loads(done.stdout)["checks"]}
    assert {"gated_deltanet-check_documented", "softmax_topk-check_documented"} <= ids


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "names, or --all"),
        (["gla", "--all"], "names, or --all"),
        (["no_such_rule"], "registered as 'no_such_rule'"),
        (["gla", "--backend", "fast"], "backend = 'fast'"),
        (["mamba", "--backend", "chunked"], "chunked"),
        (["gla", "--only", "check_nothing"], "check_nothing"),
        (["gla", "--profile", "fast"], "MOMKIT_PROFILE = 'fast'"),
        (["gla", "--device", "gpu"], "MOMKIT_DEVICE = 'gpu'"),
        (["kda", "--backend", "triton"], "no kernel family serves"),
        (["gla", "--wrong"], "--wrong"),
    ],
)
def test_a_wrong_argument_is_exit_code_two(arguments, message):
    done = run("check", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_without_hypothesis_it_says_what_to_install(monkeypatch):
    for module in [name for name in __import__("sys").modules if name.startswith("momkit.testing")]:
        monkeypatch.delitem(__import__("sys").modules, module)
    monkeypatch.setitem(__import__("sys").modules, "hypothesis", None)
    done = run("check", "gla")
    assert done.exit_code == 2
    assert "momkit[testing]" in done.stderr


def test_the_command_adds_itself():
    app = typer.Typer()
    command.add_to(app)
    assert [info.callback for info in app.registered_commands] == [command.check]
