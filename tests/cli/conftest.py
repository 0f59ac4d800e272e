"""How these tests call the command: in this process where that is enough, in one of its own where it matters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from momkit.cli.main import make_app


@pytest.fixture
def momkit():
    """Run the command in this process: `momkit("list", "--json")`."""
    app = make_app()
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], prog_name="momkit")


@pytest.fixture
def shell(tmp_path):
    """Run the command in a process of its own, with folders added to its path."""

    def run(*args, path: tuple[Path, ...] = (), **env: str):
        inherited = {k: v for k, v in os.environ.items() if k != "MOMKIT_PLUGINS"}
        paths = os.pathsep.join([*map(str, path), inherited.get("PYTHONPATH", "")]).strip(os.pathsep)
        return subprocess.run(
            [sys.executable, "-m", "momkit", *map(str, args)],
            env=inherited | {"PYTHONPATH": paths} | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
