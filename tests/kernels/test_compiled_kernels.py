"""The machine code of every kernel, compiled ahead of time: no spills, few instructions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_kernels.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """architecture -> (exit code, output); the two compile side by side."""
    pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")
    environment = ENVIRONMENT | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    running = {
        architecture: subprocess.Popen(
            [sys.executable, SCRIPT, "--quick", "--arch", str(architecture)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for architecture in (80, 90)
    }  # fmt: skip
    outputs = {architecture: process.communicate()[0] for architecture, process in running.items()}
    return {
        architecture: (running[architecture].returncode, output)
        for architecture, output in outputs.items()
    }


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_limit_is_kept(tables, architecture):
    code, output = tables[architecture]
    assert code == 0, output
    rows = re.findall(rf"^{architecture} (.{{29}}) +(.*)$", output, re.MULTILINE)
    assert len(rows) >= 17
    assert max(map(len, output.splitlines())) < 80
    header = next(line for line in output.splitlines() if line.startswith("sm"))
    ends = [m.end() for m in re.finditer(r"\S+", header)][2:]  # where each number has to end
    for line in re.findall(rf"^{architecture} .*$", output, re.MULTILINE):
        numbers = [m.end() + 32 for m in re.finditer(r"\S+", line[32:])]
        assert numbers == ends[: len(numbers)], line
    for name, numbers in rows:
        registers, spills, local = map(float, numbers.split()[1:4])
        assert spills == local == 0 and 0 < registers <= 255, name
    loops = [numbers.split() for name, numbers in rows if name.startswith("decode")]
    assert all(len(numbers) == 8 for numbers in loops)  # each has a pipelined loop
    assert {32, 48, 64, 80, 112, 128, 160, 256} <= {int(numbers[0]) for numbers in loops}
    assert all(float(numbers[7]) <= 3.5 for numbers in loops)
    assert min(float(numbers[7]) for numbers in loops if numbers[0] == "128") < 1.8


def test_all_builds_are_every_head_size():
    """What --quick leaves out is at least listed: each head size, each variant, 4 bits as well."""
    pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import check_kernels as check
built = {{(b.name, b.head_size) for b in check.builds()}}
for size in range(16, 257, 16):
    for name in ("append", "quantize", "dequantize"):
        assert (name, size) in built, (name, size)
    for name in ("decode", "decode, padding", "decode, 5 drafts, padding",
                 "decode, mask of each query"):
        assert ((name, size) in built) == (size >= 32), (name, size)
    assert (("decode, 4 bits", size) in built) == (size >= 64 and size % 32 == 0), size
quick = {{(b.name, b.head_size) for b in check.quick_builds()}}
assert quick == {{(name, size) for name, sizes in check.QUICK.items() for size in sizes}}
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)


def test_faults_are_found():
    """Half a tile of tokens a warp spills; a plain kernel reads bytes. Both must be noticed."""
    pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import check_kernels as check
from qwq_kernels.decode_attention_triton import Config
build = check._decode_build("greedy", 128, 7, config=Config(128, 1, 2, 1))
print(check.faults(build, check.compile_for(build, 90), 90))
machine = check.Machine(1, 0, 0, 0, ["LDS.U8", "HMMA"] * 300, [])
print(check.faults(build, machine, 90))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert re.search(r"'\d+ spills, ", done.stdout), done.stderr
    assert "300 byte loads" in done.stdout
