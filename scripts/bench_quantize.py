"""Encoding speed of one core, type by type, against llama.cpp's ggml_quantize_chunk.

    python scripts/bench_quantize.py --types Q4_K Q6_K

The two encode the same Gaussian weights in turn, in one thread of this process; the ratio is taken
pair by pair. Time is the thread's processor time, which other programs on the machine disturb
least. `first` is the seconds of our first call, in which numba compiles; whatever several types
share is compiled by the first of them. Outputs are compared as well: the exit code is 1
if any differ. Results go to benchmarks/quantize.csv, in place of older ones of the same type.
"""

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time

import numpy as np
from results import BENCHMARKS, ROOT, circumstances, write_results

sys.path.insert(0, str(ROOT / "tests"))
from ggml_oracle import libggml, quantize

N_COLUMNS = 4096


def seconds(encode) -> float:
    start = time.thread_time()
    encode()
    return time.thread_time() - start


def spread(values: list[float], digits: int = 1) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def bench(format, w: np.ndarray, importance: np.ndarray | None, repeats: int) -> dict:
    """Alternate the two; medians, smallest and largest values in million weights a second."""
    first = seconds(lambda: format.encode(w[:1], importance))
    quantize(format.ggml_type, w[:1], importance)  # builds ggml's tables
    ours, peer = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: format.encode(w, importance)))
        peer.append(seconds(lambda: quantize(format.ggml_type, w, importance)))
    same = np.array_equal(
        format.encode(w, importance)[""], quantize(format.ggml_type, w, importance)
    )
    return {
        "type": format.name,
        "importance": "no" if importance is None else "yes",
        "ours": spread([w.size / t / 1e6 for t in ours]),
        "ggml": spread([w.size / t / 1e6 for t in peer]),
        "times_faster": spread([p / o for o, p in zip(ours, peer, strict=True)]),
        "same_bytes": "yes" if same else "NO",
        "first": f"{first:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", nargs="+", help="default: all")
    parser.add_argument("--weights", type=int, default=2**22)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    n_rows = max(1, args.weights // N_COLUMNS)
    w = rng.standard_normal((n_rows, N_COLUMNS), np.float32) * np.float32(0.02)
    importance = (rng.standard_normal(N_COLUMNS) ** 2).astype(np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NUMBA_CACHE_DIR"] = cache  # numba, imported by the first encode, reads it
        from quant.formats import FORMATS

        requires_importance = libggml().ggml_quantize_requires_imatrix
        requires_importance.restype = ctypes.c_bool
        if unknown := set(args.types or ()) - set(FORMATS):
            parser.error(f"unknown types: {', '.join(sorted(unknown))}")
        print("million weights a second, median (least-most)")
        for format in (FORMATS[name] for name in args.types or FORMATS):
            needed = requires_importance(format.ggml_type)
            for weights in (None, importance):
                if (weights is None and needed) or (weights is not None and format.block_size == 1):
                    continue
                rows.append(bench(format, w, weights, args.repeats))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    about = {
        "weights": w.size,
        "repeats": args.repeats,
        **circumstances("numba", "llama-cpp-python", one_core=True),
    }
    names = {row["type"] for row in rows}
    rows = [row | about for row in rows]
    write_results(BENCHMARKS / "quantize.csv", rows, lambda older: older["type"] in names)
    sys.exit(any(row["same_bytes"] != "yes" for row in rows))


if __name__ == "__main__":
    main()
