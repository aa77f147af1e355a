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
    source = Path(quant.formats.compiled.__file__).read_text()
    folder.joinpath("compiled.py").write_text(source)
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


def test_without_a_folder_to_keep_them_kernels_still_run(run):
    # Of the places to try, only the one that NUMBA_CACHE_DIR would name: there is none.
    assert run(step=1, NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator") == "2 0"
    assert run(step=1, NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator") == "2 0"
