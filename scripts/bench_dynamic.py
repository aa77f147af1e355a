"""Time and peak memory of `qwq-quant dynamic-4bit` against transformers' load-in-4bit and save.

    python scripts/bench_dynamic.py

The model is a generated one of 2 billion weights in eight shards (scripts/make_checkpoint.py).
Writing alone (NF4 throughout, no measuring, no check) runs in turn with transformers:
from_pretrained with a BitsAndBytesConfig, then save_pretrained; each in a process of its own, after
one run of each that does not count, and the ratios are taken run by run. `same_tensors` tells how
many of the tensors have the very bytes of transformers'; with several threads torch may round the
mean of a weight's scales otherwise in its last bit (see quant/formats/nf4_kernels.py). Then the
whole job, measuring included, runs once. Peak memory is the largest resident set of the process;
`baseline` is that of a Python which has imported torch and transformers, `layer` a decoder layer as
it is stored. Results go to benchmarks/dynamic.csv.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

from make_checkpoint import SIZES, tensor_shapes
from results import BENCHMARKS, ROOT, circumstances, write_results

from quant.checkpoint import read_tensors
from quant.tensors import TensorReader

PEER = """
import sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
source, target = sys.argv[1:]
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["lm_head"],
)
model = AutoModelForCausalLM.from_pretrained(
    source, quantization_config=config, dtype=torch.bfloat16
)
model.save_pretrained(target)
"""

BASELINE = """
import torch
from transformers import AutoModelForCausalLM
"""


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a command; fails with its output if it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            sys.exit(f"{command[:4]} failed:\n{log.read().decode()[-3000:]}")
    return seconds, usage.ru_maxrss / 1000


def ours(model: Path, output: Path, *options: str) -> list[str]:
    code = "from quant.cli import main; main()"
    args = ["dynamic-4bit", str(model), "-o", str(output), "--no-check", *options]
    return [sys.executable, "-c", code, *args]


def peer(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-c", PEER, str(model), str(output)]


def spread(values: list[float], digits: int = 2) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def same_tensors(a: Path, b: Path) -> str:
    """How many tensors of two folders are equal, byte for byte."""
    found, expected = read_tensors(a), read_tensors(b)
    with TensorReader() as reader:
        equal = sum(
            (reader.read_bytes(one, 0, one.nbytes) == reader.read_bytes(two, 0, two.nbytes)).all()
            for name, one in found.items()
            if (two := expected.get(name)) and one.nbytes == two.nbytes
        )
    return f"{equal} of {len(found.keys() | expected.keys())}"


def bench_writing(model: Path, work: Path, repeats: int) -> list[dict]:
    """Plain and searched scales and the peer in turn; medians, smallest and largest value."""
    plain, searched, theirs = (work / name for name in ("plain", "searched", "peer"))
    commands = {
        plain: ours(model, plain, "--budget", "0", "--no-search-scales"),
        searched: ours(model, searched, "--budget", "0", "--search-scales"),
        theirs: peer(model, theirs),
    }
    figures: dict[Path, list] = {output: [] for output in commands}
    for i in range(repeats + 1):
        for output, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            result = run(command)
            if i:  # the first round fills caches and compiles
                figures[output].append(result)
    return [
        {"job": job, "runs": repeats, **compared(figures[output], figures[theirs])}
        | {"same_tensors": same_tensors(output, theirs)}
        for job, output in (("write", plain), ("write, scales searched", searched))
    ]


def compared(own: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict:
    """Seconds and MB of both, and ours as a share of theirs, run by run."""
    row = {}
    for name, results in (("ours", own), ("peer", theirs)):
        row[f"{name}_seconds"] = spread([seconds for seconds, _ in results])
        row[f"{name}_peak_mb"] = spread([megabytes for _, megabytes in results], 0)
    pairs = list(zip(own, theirs, strict=True))
    return row | {
        "time_of_peer": spread([o[0] / p[0] for o, p in pairs]),
        "memory_of_peer": spread([o[1] / p[1] for o, p in pairs]),
    }


def bench_whole(model: Path, work: Path, options: list[str]) -> dict:
    """Measure, choose and write, with the default options but for those given."""
    seconds, megabytes = run(ours(model, work / "whole", *options))
    return {
        "job": " ".join(["measure, choose, write", *(options or ["by default"])]),
        "runs": 1,
        "ours_seconds": f"{seconds:.0f}",
        "ours_peak_mb": f"{megabytes:.0f}",
    }


def layer_mb(size: str) -> float:
    shapes = tensor_shapes(size)
    return sum(2 * prod(s) for n, s in shapes.items() if n.startswith("model.layers.0.")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="to measure on; the program's default, 8192")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and the outputs")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "dynamic.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        model = work / args.size
        maker = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(model)]
        run([*maker, "--size", args.size, "--shards", str(args.shards)])
        baseline = run([sys.executable, "-c", BASELINE])[1]
        rows = [
            *bench_writing(model, work, args.repeats),
            bench_whole(model, work, ["--tokens", str(args.tokens)] if args.tokens else []),
        ]
    about = {
        "model": f"{args.size}, {args.shards} shards",
        "baseline_mb": f"{baseline:.0f}",
        "layer_mb": f"{layer_mb(args.size):.0f}",
        **circumstances("torch", "transformers", "bitsandbytes", "qwq-quant"),
    }
    columns = dict.fromkeys(key for row in rows for key in row | about)
    rows = [row | about for row in rows]
    for row in rows:
        print("\n".join(f"{key:16} {row.get(key, '')}" for key in columns), end="\n\n")
    write_results(args.output, rows)


if __name__ == "__main__":
    main()
