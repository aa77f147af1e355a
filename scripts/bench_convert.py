"""Time and peak memory of `qwq-quant to-gguf` against llama.cpp, from safetensors to the GGUF file.

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    python scripts/bench_convert.py --llama-cpp llama_cpp_python-*/vendor/llama.cpp

llama.cpp is convert_hf_to_gguf.py, and for K and I types llama-quantize after it (its library's
llama_model_quantize, from a BF16 file, with a thread a core). The two sides run in turn, each step
in a process of its own, on the same generated checkpoint (Qwen2.5-0.5B's shapes, four shards),
after one run of each that does not count; each begins with nothing left to be written to the disk,
and may keep its compiled Python modules. The ratio is taken pair by pair. Peak memory is the
largest resident set of any process. `first_run_seconds` is ours with nothing compiled yet. Results
go to benchmarks/convert.csv, in place of older ones of the same model and type.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_checkpoint import SIZES
from results import BENCHMARKS, ROOT, circumstances, write_results

from quant.mixtures import MIXTURES

PEER = """
import runpy, sys
sys.path[:0] = [{root!r}, {root!r} + "/gguf-py"]
import conversion.base
# It knows a vocabulary by the hash of its output on a text, and a generated one is not in its list.
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = ["convert_hf_to_gguf.py", *{args!r}]
runpy.run_path({root!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


CONVERTED = ("F32", "F16", "BF16", "Q8_0")
"""What the converter writes by itself."""

QUANTIZE = """
import ctypes, os, sys
from llama_cpp import llama_cpp
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = {file_type}, os.cpu_count()
sys.exit(llama_cpp.llama_model_quantize({source!r}, {target!r}, ctypes.byref(params)))
"""


def run(commands: list[list[str]], **environment: str) -> tuple[float, float]:
    """Wall seconds of all commands, and the peak resident MB of any."""
    results = [run_one(command, environment) for command in commands]
    return sum(seconds for seconds, _ in results), max(megabytes for _, megabytes in results)


def run_one(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a command; fails with its output if it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        env = {**os.environ, **environment}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # else both would compile their modules each time
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            sys.exit(f"{command[:4]} failed:\n{log.read().decode()[-3000:]}")
    return seconds, usage.ru_maxrss / 1000


def ours(model: Path, output: Path, type_name: str) -> list[list[str]]:
    code = "from quant.cli import main; main()"
    args = ["to-gguf", model, "-o", output, "--type", type_name, "--force"]
    return [[sys.executable, "-c", code, *map(str, args)]]


def peer(llama_cpp: Path, model: Path, output: Path, type_name: str) -> list[list[str]]:
    """One process, or two with a 16-bit file between them."""
    converted = output if type_name in CONVERTED else output.with_suffix(".bf16.gguf")
    out_type = type_name.lower() if converted == output else "bf16"
    args = [str(model), "--outfile", str(converted), "--outtype", out_type]
    steps = [[sys.executable, "-c", PEER.format(root=str(llama_cpp.resolve()), args=args)]]
    if converted != output:
        code = QUANTIZE.format(
            file_type=MIXTURES[type_name].file_type,
            source=str(converted).encode(),
            target=str(output).encode(),
        )
        steps.append([sys.executable, "-c", code])
    return steps


def spread(values: list[float], digits: int = 2) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def make(folder: Path, size: str, n_shards: int) -> Path:
    """A generated checkpoint, made in a process of its own: a child inherits our peak memory."""
    model = folder / size
    maker = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(model)]
    maker += ["--size", size, "--shards", str(n_shards)]
    subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
    return model


def bench(args, model: Path, work: Path, type_name: str) -> dict:
    """Alternate the two; medians with the smallest and largest value."""
    commands = {
        "ours": ours(model, work / "ours.gguf", type_name),
        "peer": peer(args.llama_cpp, model, work / "peer.gguf", type_name),
    }
    with tempfile.TemporaryDirectory() as nothing_compiled:
        first_run, _ = run(commands["ours"], NUMBA_CACHE_DIR=nothing_compiled)
    figures = {name: [] for name in commands}
    for i in range(args.repeats + 1):
        for name, command in commands.items():
            (work / f"{name}.gguf").unlink(missing_ok=True)
            os.sync()  # what the other left to be written is not this one's to wait for
            result = run(command)
            if i:  # the first round fills caches and compiles
                figures[name].append(result)
    ratios = [p[0] / o[0] for o, p in zip(figures["ours"], figures["peer"], strict=True)]
    row = {"model": model.name, "shards": args.shards, "type": type_name, "runs": args.repeats}
    for name, results in figures.items():
        row[f"{name}_seconds"] = spread([seconds for seconds, _ in results])
        row[f"{name}_peak_mb"] = spread([megabytes for _, megabytes in results], 0)
    return row | {"times_faster": spread(ratios), "first_run_seconds": f"{first_run:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source folder")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b"])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--types", nargs="+", default=["BF16", "Q8_0", "Q4_K_M"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and the outputs")
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            work = Path(folder)
            model = make(work, size, args.shards)
            rows += [bench(args, model, work, type_name) for type_name in args.types]
    about = {
        **circumstances("numpy", "qwq-quant"),
        "peer": "convert_hf_to_gguf.py (and llama_model_quantize) of "
        + _peer_version(args.llama_cpp),
    }
    rows = [row | about for row in rows]
    for row in rows:
        print("\n".join(f"{key:16} {value}" for key, value in row.items()), end="\n\n")
    cases = {_case(row) for row in rows}
    write_results(BENCHMARKS / "convert.csv", rows, lambda older: _case(older) in cases)


def _case(row: dict) -> tuple[str, str]:
    return row["model"], row["type"]


def _peer_version(llama_cpp: Path) -> str:
    folder = llama_cpp.resolve().parent.parent.name  # llama_cpp_python-0.3.36
    return folder.replace("_", "-") if folder.startswith("llama_cpp_python") else "llama.cpp"


if __name__ == "__main__":
    main()
