"""Encoding speed of one core, NF4 and FP4, against bitsandbytes' CPU quantizer.

    python scripts/bench_nf4.py

The two encode the same bfloat16 weights in turn, in one thread of this process, each from the
stored bits to the parts that go into a file; the ratio is taken pair by pair. Time is the thread's
processor time, which other programs on the machine disturb least. bitsandbytes takes the weight
whole, we a million values at a time, as each is used; `peak` is the most memory beyond the weight
itself, in bytes per byte of it (ours without numba's compiled code). The last column is the squared
error against the plain type's. Outputs are compared as well. Results go to benchmarks/nf4.csv.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit
from results import BENCHMARKS, circumstances, write_results

from quant.formats.nf4 import Bnb4bit
from quant.tensors import to_float32

SHAPE = (1024, 5120)
CASES = [
    Bnb4bit(quant_type, double_quant, 64, search)
    for quant_type in ("nf4", "fp4")
    for search in (False, True)
    for double_quant in (True, False)
]


def ours(format: Bnb4bit, halves: np.ndarray) -> dict[str, np.ndarray]:
    def read_rows(start, stop):
        return to_float32(halves[start:stop], "BF16")

    return format.encode_rows(read_rows, halves.shape, "bfloat16")


def theirs(format: Bnb4bit, halves: np.ndarray) -> dict[str, np.ndarray]:
    packed, state = quantize_4bit(
        torch.from_numpy(halves).view(torch.bfloat16),
        blocksize=format.blocksize,
        quant_type=format.quant_type,
        compress_statistics=format.double_quant,
    )
    parts = {"": packed, **state.as_dict(packed=True)}
    return {name: part.numpy() for name, part in parts.items()}


ENCODERS = {"ours": ours, "bnb": theirs}


def weights(shape: tuple[int, int]) -> np.ndarray:
    """Gaussian weights as bfloat16 bits, uint16."""
    w = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    return (w.view(np.uint32) >> 16).astype(np.uint16)


def seconds(encode, *args) -> float:
    start = time.thread_time()
    encode(*args)
    return time.thread_time() - start


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def squared_error(format: Bnb4bit, halves: np.ndarray) -> float:
    w = to_float32(halves, "BF16")
    return float(np.square(format.decode(ours(format, halves), w.shape) - w, dtype=float).sum())


def bench(format: Bnb4bit, halves: np.ndarray, repeats: int, peaks: dict[str, str]) -> dict:
    """Alternate the two; medians, smallest and largest values in million weights a second."""
    ours(format, halves[:64]), theirs(format, halves[:64])
    times, peer = [], []
    for _ in range(repeats):
        times.append(seconds(ours, format, halves))
        peer.append(seconds(theirs, format, halves))
    a, b = ours(format, halves), theirs(format, halves)
    same = all(np.array_equal(a[name], part) for name, part in b.items())
    plain = Bnb4bit(format.quant_type, format.double_quant, format.blocksize)
    change = squared_error(format, halves) / squared_error(plain, halves) - 1
    return {
        "type": format.quant_type,
        "double_quant": "yes" if format.double_quant else "no",
        "search_scales": "yes" if format.search_scales else "no",
        "ours": spread([halves.size / t / 1e6 for t in times]),
        "bitsandbytes": spread([halves.size / t / 1e6 for t in peer]),
        "times_faster": spread([p / t for p, t in zip(peer, times, strict=True)]),
        "same_bytes": "yes" if same else "no, searched" if format.search_scales else "NO",
        "peak_ours": peaks["ours"],
        "peak_bitsandbytes": peaks["bnb"],
        "squared_error": f"{change:+.1%}",
    }


def peak_of_child(who: str, shape: tuple[int, int]) -> str:
    """Memory beyond the weight while it is encoded as NF4, in a process of its own."""
    command = [sys.executable, __file__, "--peak", who, *map(str, shape)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def print_peak(who: str, shape: tuple[int, int]) -> None:
    ENCODERS[who](Bnb4bit(), weights((64, shape[1])))  # libraries loaded, code compiled
    halves = weights((64, shape[1])).repeat(shape[0] // 64, axis=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ENCODERS[who](Bnb4bit(), halves)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{1024 * (after - before) / halves.nbytes:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs=2, type=int, default=SHAPE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        who, *shape = args.peak
        print_peak(who, tuple(map(int, shape)))
        return
    peaks = {who: peak_of_child(who, (4096, SHAPE[1])) for who in ENCODERS}
    halves, rows = weights(tuple(args.shape)), []
    print("million weights a second, median (least-most)")
    for format in CASES:
        rows.append(bench(format, halves, args.repeats, peaks))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    about = {
        "shape": " x ".join(map(str, args.shape)),
        "repeats": args.repeats,
        **circumstances("numba", "torch", one_core=True),
        "bitsandbytes_version": version("bitsandbytes"),
    }
    write_results(BENCHMARKS / "nf4.csv", [row | about for row in rows])


if __name__ == "__main__":
    main()
