"""The kernels' cache on disk: used when nothing changed, dropped when any source did."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quant.formats.compiled

KERNEL = """
from numba import njit
from .compiled import kernel
from .helper import step

@kernel
def count(x):
    return step(x)

print(count(1), sum(count.stats.cache_hits.values()))
"""


@pytest.fixture
def run(tmp_path):
    """A folder with a kernel and a helper; run(step) writes the helper and runs the kernel."""
    folder = tmp_path / "room"
    folder.mkdir()
    folder.joinpath("__init__.py").touch()
    for name in ("compiled.py", "sources.py"):
        source = Path(quant.formats.compiled.__file__).with_name(name).read_text()
        folder.joinpath(name).write_text(source.replace("from quant.formats.", "from ."))
    folder.joinpath("kernels.py").write_text(KERNEL)

    def run(step: int, **environment: str) -> str:
        helper = f"from numba import njit\n@njit\ndef step(x):\n    return x + {step}\n"
        folder.joinpath("helper.py").write_text(helper)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
        done = subprocess.run(
            [sys.executable, "-m", "room.kernels"],
            cwd=tmp_path,
            env={**kept, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_changed_helper_is_compiled_anew(run):
    assert run(step=1) == "2 0"
    assert run(step=1) == "2 1"
    assert run(step=10) == "11 0"


def test_a_cache_that_is_damaged_or_full_costs_only_compiling(run, tmp_path):
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run(step=1, **kept) == "2 0"
    files = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) == 2
    for path in files:  # the index, and the machine code
        path.write_bytes(path.read_bytes()[:40])
        assert run(step=1, **kept) == "2 0"
        assert run(step=1, **kept) == "2 1"
    # A folder at the place of a file: nothing can be written there.
    (index,) = (path for path in files if path.suffix == ".nbi")
    index.unlink()
    index.mkdir()
    assert run(step=1, **kept) == "2 0"


def test_without_a_folder_to_keep_them_kernels_still_run(run):
    # Of the places to try, only the one that NUMBA_CACHE_DIR would name: there is none.
    assert run(step=1, NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator") == "2 0"
    assert run(step=1, NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator") == "2 0"
