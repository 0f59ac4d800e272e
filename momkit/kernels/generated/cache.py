"""Generated modules on disk, where Triton can read their source, named by a hash of what they say."""

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from momkit.errors import BackendError


def folder() -> Path:
    """$MOMKIT_CACHE, or momkit in the user's cache."""
    chosen = os.environ.get("MOMKIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "momkit"


@cache
def keep(rule: str, source: str) -> str:
    """Write a module, unless it is there, and return its key."""
    key = f"{re.sub(r'[^a-zA-Z0-9_]', '_', rule)}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = folder() / f"{key}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # another process may be writing the same module: it appears whole or not at all
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(source)
        os.replace(file.name, path)
    return key


@cache
def module(key: str) -> ModuleType:
    """The module of a key; BackendError if its file is gone."""
    path = folder() / f"{key}.py"
    if not path.exists():
        raise BackendError(f"the generated kernel {key!r} is not in {folder()}; scan with its rule to write it anew")
    name = f"momkit.kernels.generated.modules.{key}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
