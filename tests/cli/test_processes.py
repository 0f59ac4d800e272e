"""What only a process of its own shows: that stdout is pure, and that a broken plugin stops nothing."""

import json
import sys

import pytest


def write_plugin(folder, name, code):
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[momkit]\n{name} = {name}\n")


@pytest.fixture
def plugins(tmp_path):
    """A folder with a plugin that leaves the process while it is imported, and one that talks."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    write_plugin(folder, "quitter", "import sys\nprint('on my way out')\nsys.exit(3)\n")
    write_plugin(
        folder,
        "talker",
        "import momkit\nprint('hello')\n\n\n@momkit.hookimpl\ndef momkit_register_tasks(register):\n    print('hook')\n",
    )
    return folder


def test_json_is_all_that_stdout_holds(shell, plugins):
    listed = shell("list", "--json", path=(plugins,))
    assert listed.returncode == 0
    found = json.loads(listed.stdout)
    assert found["broken_plugins"] == [{"name": "quitter", "error": "SystemExit: 3"}]
    assert len(found["mechanisms"]) >= 15
    assert "hello" in listed.stderr

    checked = shell("doctor", "--json", path=(plugins,))
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert {p["name"]: p["status"] for p in found["plugins"]} == {
        "momkit": "loaded",
        "quitter": "failed",
        "talker": "loaded",
    }


def test_reports_for_people_name_a_broken_plugin(shell, plugins):
    listed = shell("list", path=(plugins,))
    assert listed.returncode == 0
    assert "plugin quitter failed: SystemExit: 3" in listed.stdout
    assert "gated_deltanet" in listed.stdout
    left_out = shell("doctor", path=(plugins,), MOMKIT_PLUGINS="talker")
    assert left_out.returncode == 0
    assert "left out by MOMKIT_PLUGINS" in left_out.stdout and "SystemExit" not in left_out.stdout


def test_a_fault_is_one_line_and_no_traceback(shell):
    failed = shell("show", "nothing_of_this_name", "--json")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1 and failed.stderr.startswith("momkit: ")
    assert sys.executable not in failed.stderr
