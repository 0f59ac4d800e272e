"""What only a process of its own shows: that stdout is pure, and that a broken plugin stops nothing."""

import json
import sys

import pytest

TALKER = """
import momkit

print("hello")


@momkit.hookimpl
def momkit_register_tasks(register):
    print("hello from the hook")
"""


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
    write_plugin(folder, "talker", TALKER)
    return folder


def test_json_is_all_that_stdout_holds(shell, plugins):
    listed = shell("list", "--json", path=(plugins,))
    assert listed.returncode == 0
    found = json.loads(listed.stdout)
    assert found["broken_plugins"] == [{"name": "quitter", "error": "SystemExit: 3"}]
    assert len(found["mechanisms"]) >= 15
    assert "hello" in listed.stderr


def test_doctor_names_a_broken_plugin_and_is_content(shell, plugins):
    checked = shell("doctor", path=(plugins,))
    assert checked.returncode == 0, checked.stderr
    assert "SystemExit: 3" in checked.stdout
    assert "momkit works" in checked.stdout


def test_a_fault_is_one_line_and_no_traceback(shell):
    failed = shell("show", "nothing_of_this_name", "--json")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1 and failed.stderr.startswith("momkit: ")
    assert sys.executable not in failed.stderr
