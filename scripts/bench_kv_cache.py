"""The int8 KV cache on this machine: is it right, how fast is it, how much memory does it save?

    python scripts/bench_kv_cache.py            one CUDA device, under eight minutes
    python scripts/bench_kv_cache.py --tiny     the same steps at toy sizes, on the CPU too

1. Checks. The kernels against the reference in plain torch, and a trained model, teacher-forced,
   against its bf16 cache. Nothing is timed if one fails.
2. Timings, as shares of the bandwidth that copying reaches here: quantize and dequantize (target:
   90 %), decode attention (70 %), and that against the fastest of torch's attention functions over
   a bf16 cache (1.5 times as fast where batch x context is 256k tokens).
3. Qwen's tables: memory of a model of Qwen-7B's shape with random weights, against what Qwen
   published. The cache is filled to `length` tokens less the steps that are then decoded: memory is
   at its peak at the end. `peak` is what torch had allocated, which is compared; `device` is what
   the driver counts, CUDA's own half gigabyte included. Which of them Qwen counted is not known;
   its GB are GiB, since 15.0 of them hold 15.4e9 bytes of weights and a cache.

Times are medians of device time; four gigabytes of zeros are written between any two, so that
nothing is found in a cache. Each result is in benchmarks/kv_cache.csv as soon as it is printed,
where rows of parts that --only leaves out stay as they are; toy sizes are written only to a --csv.
What fails (memory, say) is a row that says so, and the next one follows. The exit code is 1 if a
check is missed or anything failed; a target that is missed does not change it.
"""

import argparse
import csv
import datetime
import gc
import itertools
import json
import platform
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from qwq_kernels import decode_attention as decode
from qwq_kernels import kv_int8
from results import BENCHMARKS, ROOT, write_results
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from quant.kv_cache import Int8Cache, enable_int8_attention

GIB = 2**30

QWEN_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936,
    "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip

# (batch, length) -> GB with a bf16 cache (None: out of memory), GB with Qwen's int8 cache.
# ref: github.com/QwenLM/Qwen, README, "Quantization of KV cache"; A100-SXM4-80G
PUBLISHED = {
    (1, 1024): (16.3, 15.5), (4, 1024): (24.1, 17.2), (16, 1024): (31.7, 22.3),
    (32, 1024): (48.7, 30.2), (64, 1024): (None, 48.2), (100, 1024): (None, 72.4),
    (1, 512): (15.2, 15.0), (1, 2048): (17.6, 15.8), (1, 4096): (19.5, 16.6),
    (1, 8192): (23.2, 17.6),
}  # fmt: skip

N_STEPS = 8
"""Decoded in each row of the tables."""

TIMINGS_END_S, TABLES_END_S = 240, 400
"""After so many seconds no timing and no row of the tables is begun any more."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    prompt: tuple[int, int, int, int]  # batch, heads, tokens, head size of what is quantized
    attention: list[tuple[int, int, int, int]]  # batch, context, query heads, key heads
    min_tokens: int  # batch x context from which on the targets hold
    flush: int  # bytes written between two timings
    repeats: int
    model: dict
    rows: list[tuple[int, int]]


FULL = Sizes(
    prompt=(8, 8, 32768, 128),
    attention=[
        (1, 262144, 28, 4), (8, 32768, 28, 4), (64, 4096, 28, 4),  # Qwen2.5-7B
        (1, 262144, 32, 32), (8, 32768, 32, 32), (64, 4096, 32, 32),  # Qwen-7B
        (8, 32768, 40, 8), (128, 8192, 40, 8),  # QwQ-32B
        (1, 4096, 28, 4), (1, 32768, 28, 4), (8, 4096, 40, 8),  # too small for the targets
    ],
    min_tokens=256 * 1024,
    flush=4 * GIB,
    repeats=20,
    model=QWEN_7B,
    rows=list(PUBLISHED),
)  # fmt: skip

TINY = Sizes(
    prompt=(1, 2, 70, 64),
    attention=[(2, 130, 4, 2)],
    min_tokens=10**9,
    flush=1024,
    repeats=2,
    model=QWEN_7B | {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 500},
    rows=[(1, 40), (2, 40)],
)  # fmt: skip


class Machine:
    """The device: time and memory on it."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.started = time.monotonic()
        self._flush: torch.Tensor | None = None

    @property
    def name(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        return f"{platform.processor() or platform.machine()}, CPU"

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def is_late(self, end_s: float, what: str) -> bool:
        """Whether `end_s` is over; then it says that `what` is left out."""
        late = self.elapsed_s > end_s
        if late:
            print(f"{what}: left out, {self.elapsed_s:.0f} s are over", flush=True)
        return late

    def write_much(self) -> None:
        """Keep the device busy for a while, and leave nothing of interest in its caches."""
        if self._flush is None:
            self._flush = torch.empty(self.sizes.flush, dtype=torch.uint8, device=self.device)
        self._flush.zero_()

    def times_ms(self, function) -> list[float]:
        """Of each repetition, device time, after two for warming up.

        Writing four gigabytes takes the device a millisecond, longer than the host needs to launch
        `function`, so that the host's time is not measured.
        """
        for _ in range(2):
            function()
        self.synchronize()
        if not self.cuda:
            return [self._host_ms(function) for _ in range(self.sizes.repeats)]
        pairs = []
        for _ in range(self.sizes.repeats):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.write_much()
            pair[0].record()
            function()
            pair[1].record()
            pairs.append(pair)
        self.synchronize()
        return [first.elapsed_time(last) for first, last in pairs]

    @staticmethod
    def _host_ms(function) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give back what nobody holds, and count peaks from here."""
        self._flush = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_nbytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else 0

    def device_nbytes(self) -> int:
        """What the driver counts as taken, by everything on the device."""
        if not self.cuda:
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


PARTS = {"checks": ("check",), "timings": ("timing", "tuning"), "tables": ("table",)}
"""What --only takes -> `part` of its rows."""


class Results:
    """Rows of the CSV; printed and written as they come: a run cut short leaves its part.

    path: None to write none. only: whose older rows are replaced, a key of PARTS; None: all.
    """

    COLUMNS = ("part", "case", "measure", "value", "unit", "target", "verdict")

    def __init__(self, path: Path | None, machine: Machine, only: str | None = None):
        self.rows: list[dict] = []
        self._path, self._only = path, only
        self._about = {
            "date": datetime.date.today().isoformat(),
            "machine": machine.name,
            "python": platform.python_version(),
        }
        for package in ("torch", "triton", "transformers"):
            try:
                self._about[package] = version(package)
            except PackageNotFoundError:
                self._about[package] = ""

    def add(self, part: str, case: str, measure: str, value: float, unit: str,
            target: str = "", ok: bool | None = None) -> None:  # fmt: skip
        verdict = {True: "ok", False: "MISSED", None: ""}[ok]
        values = (part, case, measure, f"{value:.6g}", unit, target, verdict)
        row = dict(zip(self.COLUMNS, values, strict=True)) | self._about
        if self._path is not None:
            self._write(self._path, row)
        self.rows.append(row)
        print(f"{case:44} {measure:26}{value:12.5g} {unit:8} {target:12} {verdict}", flush=True)

    def _write(self, path: Path, row: dict) -> None:
        """The first row of a run takes the place of older ones; the next ones are appended."""
        if not self.rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_results(path, [row], self._replaces)
            return
        with path.open("r+", newline="") as file:
            columns = next(csv.reader(file))  # older rows may have more
            file.seek(0, 2)
            csv.DictWriter(file, columns).writerow(row)

    def _replaces(self, older: dict) -> bool:
        return self._only is None or older["part"] in PARTS[self._only]

    def attempt(self, part: str, case: str, function, *arguments) -> None:
        """Call function(*arguments). What it raises becomes a row, and whoever called goes on."""
        try:
            function(*arguments)
        except Exception as error:  # no memory, no such backend, a kernel that does not compile
            traceback.print_exc(limit=-3)
            self.add(part, case, f"failed: {type(error).__name__}", 1, "", ok=False)

    def count(self, **wanted: str) -> int:
        """Rows that have these values."""
        return sum(wanted.items() <= row.items() for row in self.rows)

    @property
    def n_failed(self) -> int:
        return sum(row["measure"].startswith("failed: ") for row in self.rows)


def randn(machine: Machine, *shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=machine.device)


def as_in_a_model(machine: Machine, batch: int, heads: int, tokens: int, size: int, dtype):
    """(batch, heads, tokens, size) with the strides of a projection's output."""
    return randn(machine, batch, tokens, heads, size, dtype=dtype).transpose(1, 2)


def filled(machine: Machine, batch: int, heads: int, length: int, size: int, *,
           bits: int = 8, channels=None, dtype=torch.bfloat16):  # fmt: skip
    kv = kv_int8.allocate(
        batch, heads, -(-length // 16) * 16 + 64, size, size,
        value_bits=bits, channels=channels, device=machine.device,
    )  # fmt: skip
    for first in range(0, length, 65536):  # pieces, so that what is random stays small
        n = min(65536, length - first)
        k, v = (as_in_a_model(machine, batch, heads, n, size, dtype) for _ in range(2))
        kv = kv_int8.append(kv, k, v)
    return kv


def channel_scales(machine: Machine, heads: int, size: int) -> kv_int8.ChannelScales:
    spread = torch.rand(heads, size, device=machine.device) * 0.9 + 0.1
    return kv_int8.ChannelScales(randn(machine, heads, size, dtype=torch.float32), spread)


# --- 1. checks --------------------------------------------------------------------------------


def check_quantizing(machine: Machine, results: Results) -> None:
    """Bytes, scales and dequantized values equal the reference's to the bit."""
    n_cases = n_equal = 0
    for batch, heads, tokens, size in kv_int8.CASES:
        for dtype in kv_int8.DTYPES:
            for bits in (8, 4) if size % 32 == 0 else (8,):
                channels = channel_scales(machine, heads, size) if bits == 8 else None
                x = as_in_a_model(machine, batch, heads, tokens, size, dtype)
                x[0, 0, 0] = 0
                x[-1, -1, -1, 1] = 1000.0
                q, scale = kv_int8.quantize(x, bits, channels)
                expected = kv_int8.reference_quantize(x, bits, channels)
                out = kv_int8.dequantize(q, scale, dtype, channels)
                wanted = kv_int8.reference_dequantize(*expected, dtype, channels)
                n_cases += 1
                n_equal += all(
                    torch.equal(a, b)
                    for a, b in zip((q, scale, out), (*expected, wanted), strict=True)
                )
    results.add("check", "quantize, dequantize", "bit-exact cases", n_equal, "",
                f"= {n_cases}", n_equal == n_cases)  # fmt: skip


KINDS = ("none", "padding", "numbers")
"""Of masks."""


def worst_error(machine: Machine, case, dtype, bits: int, centred: bool, mask_kind: str) -> float:
    """Largest error of one case, in units of its tolerance."""
    batch, heads, group, n_queries, length, size = case
    channels = channel_scales(machine, heads, size) if centred else None
    kv = filled(machine, batch, heads, length, size, bits=bits, channels=channels, dtype=dtype)
    a = as_in_a_model(machine, batch, heads * group, n_queries, size, dtype)
    mask = None
    if mask_kind == "padding":
        first = 3 * torch.arange(batch, device=machine.device)[:, None]
        mask = torch.arange(length, device=machine.device)[None] >= first
    elif mask_kind == "numbers":
        mask = randn(machine, batch, 1, n_queries, length, dtype=torch.float32)
    out = decode.decode_attention(a, kv, mask, 0.1)
    again = decode.decode_attention(a, kv, mask, 0.1)
    if not torch.equal(out, again):
        return float("inf")
    expected = decode.reference(a.double(), kv, mask, 0.1, torch.float64)
    v = kv_int8.reference_dequantize(kv.v[:, :, :length], kv.v_scale[..., :length])
    tolerance = decode.TOLERANCE[dtype] * v.abs().max().item()
    error = (out.double() - expected).abs().max().item()
    return error / tolerance if error == error else float("inf")


def check_attention(machine: Machine, results: Results) -> None:
    """Every case with every mask, in all dtypes and bits, scratch memory full of NaN; twice."""
    cases = [*decode.CASES, (2, 2, 7, 4, 5000, 128)]
    if machine.cuda:  # a long one, and head sizes with a tile of each width
        cases += [(1, 4, 7, 1, 40_000, 128), (2, 2, 5, 4, 700, 48), (1, 1, 8, 1, 900, 112),
                  (1, 2, 4, 2, 700, 160), (2, 1, 1, 1, 900, 192)]  # fmt: skip
    settings = itertools.product(cases, KINDS)
    errors = []
    for i, (case, kind) in enumerate(settings):
        dtype = kv_int8.DTYPES[(i + i // 3) % 3]  # in turn: each setting is compiled anew
        bits = 4 if case[5] == 128 and dtype == torch.float16 else 8
        errors.append(worst_error(machine, case, dtype, bits, kind == "none", kind))
    worst = max(errors)
    results.add("check", f"decode attention, {len(errors)} cases", "worst error / tolerance", worst,
                "", "< 1", worst < 1)  # fmt: skip


def check_far_addresses(machine: Machine, results: Results) -> None:
    """A cache whose second half lies beyond 2^31 bytes gives what a small one gives."""
    capacity = 2**31 // 128 + 64 if machine.cuda else 4096
    kv = kv_int8.allocate(2, 1, capacity, 128, 128, device=machine.device)
    small = kv_int8.allocate(2, 1, 128, 128, 128, device=machine.device)
    k, v = (as_in_a_model(machine, 2, 1, 100, 128, torch.bfloat16) for _ in range(2))
    a = as_in_a_model(machine, 2, 7, 1, 128, torch.bfloat16)
    outs = [decode.decode_attention(a, kv_int8.append(x, k, v)) for x in (kv, small)]
    same = torch.equal(*outs)
    results.add("check", "addresses beyond 2^31", "same bits", float(same), "", "= 1", same)


def check_stream(machine: Machine, results: Results) -> None:
    """Kernels run on the current stream: work queued there before them is seen."""
    if not machine.cuda:
        return
    k = as_in_a_model(machine, 4, 8, 4096, 128, torch.bfloat16)
    expected = kv_int8.reference_quantize(k * 3)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        machine.write_much()
        q, _ = kv_int8.quantize(k * 3)
    stream.synchronize()
    same = torch.equal(q, expected)
    results.add("check", "a stream of one's own", "same bits", float(same), "", "= 1", same)


def check_model(machine: Machine, results: Results) -> None:
    """examples/tiny-qwq in bf16, teacher-forced: how far the int8 cache moves it."""
    folder = ROOT / "examples" / "tiny-qwq"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(machine.device).eval()
    lines = (ROOT / "tests" / "texts" / "heldout.jsonl").read_text().splitlines()
    text = " ".join(json.loads(line)["text"] for line in lines[:20])
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    tokens = tokens[:, : 300 if machine.cuda else 90].to(machine.device)
    padded = torch.cat([tokens, tokens])  # the second is left-padded
    mask = torch.ones_like(padded)
    mask[1, :9] = 0

    @torch.no_grad()
    def logits(cache) -> torch.Tensor:
        out = []
        pieces = [40, *[1] * 20, 5, 5, *[1] * (tokens.shape[1] - 70)]
        first = 0
        for n in pieces:
            seen = mask[:, : first + n]
            piece = padded[:, first : first + n]
            out.append(model(piece, attention_mask=seen, past_key_values=cache).logits[:, -n:])
            first += n
        return torch.cat(out, dim=1)[:, 40:].double()

    expected = logits(DynamicCache(config=model.config))
    for name in ("dequantized", "read in int8"):
        if name == "read in int8":
            enable_int8_attention(model)
        got = logits(Int8Cache(model.config))
        p, q = expected.log_softmax(-1), got.log_softmax(-1)
        kld = (p.exp() * (p - q)).sum(-1).mean().item()
        same = (expected.argmax(-1) == got.argmax(-1)).double().mean().item()
        results.add(
            "check", f"tiny-qwq, {name}", "KL divergence", kld, "nats", "< 1e-3", kld < 1e-3
        )
        results.add("check", f"tiny-qwq, {name}", "same token", same, "", ">= 0.95", same >= 0.95)


def run_checks(machine: Machine, results: Results) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for check in (check_quantizing, check_attention):
        results.attempt("check", check.__name__, check, machine, results)
    torch.use_deterministic_algorithms(False)
    for check in (check_far_addresses, check_stream, check_model):
        results.attempt("check", check.__name__, check, machine, results)
        machine.clear()


# --- 2. timings -------------------------------------------------------------------------------


def copy_bandwidth(machine: Machine, results: Results) -> float:
    """Bytes a second, read and written, of copying as much as is quantized."""
    x = randn(machine, *machine.sizes.prompt)
    y = torch.empty_like(x)
    ms = statistics.median(machine.times_ms(lambda: y.copy_(x)))
    rate = 2 * x.nbytes / ms * 1e3
    results.add("timing", f"copy, {x.nbytes / 1e9:.2f} GB", "bandwidth", rate / 1e9, "GB/s")
    return rate


def time_quantizing(machine: Machine, results: Results, bandwidth: float) -> None:
    """append of K and V (a prompt, and one token), and dequantize."""
    batch, heads, tokens, size = machine.sizes.prompt
    shape = "x".join(map(str, machine.sizes.prompt))
    k, v = (as_in_a_model(machine, *machine.sizes.prompt, torch.bfloat16) for _ in range(2))
    for name, channels in (("", None), (", channel scales", channel_scales(machine, heads, size))):
        kv = kv_int8.allocate(
            batch, heads, tokens + 16, size, size, channels=channels, device=machine.device
        )
        written = batch * heads * tokens * kv_int8.token_nbytes(size, size)

        ms = statistics.median(machine.times_ms(lambda kv=kv: kv_int8.append(kv, k, v)))
        share = (k.nbytes + v.nbytes + written) / ms * 1e3 / bandwidth
        results.add("timing", f"quantize K and V {shape}{name}", "share of copy", share, "",
                    ">= 0.9", share >= 0.9 if machine.cuda else None)  # fmt: skip

        out = torch.empty_like(k)
        q, scale = kv.k[:, :, :tokens], kv.k_scale[..., :tokens]

        def read_back(q=q, scale=scale, channels=channels, out=out):
            kv_int8.dequantize(q, scale, out.dtype, channels, out)

        ms = statistics.median(machine.times_ms(read_back))
        share = (k.nbytes + written / 2) / ms * 1e3 / bandwidth
        results.add("timing", f"dequantize {shape}{name}", "share of copy", share, "",
                    ">= 0.9", share >= 0.9 if machine.cuda else None)  # fmt: skip
    one = [x[:, :, :1] for x in (k, v)]
    ms = statistics.median(machine.times_ms(lambda: kv_int8.append(kv, *one)))
    results.add("timing", f"quantize one token of {batch} x {heads}", "time", ms * 1e3, "us")


def peers(a: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict:
    """torch's ways to attend with one query: each backend; query heads that share a key head
    as they are, and packed as if they were several queries, which transformers does."""
    batch, heads, size = k.shape[0], k.shape[1], k.shape[3]
    packed = a.reshape(batch, heads, -1, size)
    gqa = a.shape[1] != heads
    functions = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        for name, query, options in (
            ("packed", packed, {}),
            ("gqa", a, {"enable_gqa": True} if gqa else {}),
        ):
            if name == "gqa" and not gqa:
                continue

            def call(query=query, options=options, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(query, k, v, **options)

            functions[f"{backend.name.lower().removesuffix('_attention')} {name}"] = call
    return functions


def fastest_peer(machine: Machine, a, k, v) -> tuple[str, float]:
    best = "none", float("inf")
    for name, call in peers(a, k, v).items():
        if name.startswith("math") and machine.cuda:
            continue  # converts everything; never the fastest
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend cannot
                ms = statistics.median(machine.times_ms(call))
        except RuntimeError:  # a backend that cannot
            continue
        best = min(best, (name, ms), key=lambda pair: pair[1])
    if best[0] == "none":
        raise RuntimeError("none of torch's backends attends with these sizes")
    return best


def time_attention(machine: Machine, results: Results, bandwidth: float) -> None:
    for shape in machine.sizes.attention:
        batch, context, n_heads, heads = shape
        case = f"decode {batch} x {context}, heads {n_heads}/{heads}"
        if not machine.is_late(TIMINGS_END_S, case):
            results.attempt(
                "timing", case, time_one_attention, machine, results, bandwidth, case, shape
            )
            machine.clear()


def time_one_attention(
    machine: Machine, results: Results, bandwidth: float, case: str, shape: tuple
) -> None:
    batch, context, n_heads, heads = shape
    size = machine.sizes.prompt[3]
    held = batch * context >= machine.sizes.min_tokens
    a = as_in_a_model(machine, batch, n_heads, 1, size, torch.bfloat16)
    kv = filled(machine, batch, heads, context, size)
    ms = statistics.median(machine.times_ms(lambda kv=kv: decode.decode_attention(a, kv)))
    nbytes = batch * heads * context * kv_int8.token_nbytes(size, size)
    share = nbytes / ms * 1e3 / bandwidth
    results.add("timing", case, "share of copy", share, "", ">= 0.7" if held else "",
                share >= 0.7 if held else None)  # fmt: skip
    results.add("timing", case, "time", ms * 1e3, "us")
    del kv
    machine.clear()
    k, v = (randn(machine, batch, heads, context, size) for _ in range(2))
    name, peer_ms = fastest_peer(machine, a, k, v)
    results.add("timing", case, f"vs {name}", peer_ms / ms, "times", ">= 1.5" if held else "",
                peer_ms / ms >= 1.5 if held else None)  # fmt: skip


def time_candidates(machine: Machine, results: Results, bandwidth: float) -> None:
    """Other tile sizes than CONFIGS has, for whoever tunes them."""
    if not machine.cuda:
        return
    from qwq_kernels import decode_attention_triton as kernels

    batch, context, n_heads, heads = 8, 32768, 28, 4
    a = as_in_a_model(machine, batch, n_heads, 1, 128, torch.bfloat16)
    kv = filled(machine, batch, heads, context, 128)
    nbytes = batch * heads * context * kv_int8.token_nbytes(128, 128)
    for config in (
        kernels.config_of(128),
        kernels.Config(64, 2, 3, 6),
        kernels.Config(32, 1, 2, 9),
        kernels.Config(64, 4, 2, 5),
        kernels.Config(128, 4, 2, 4),
    ):
        for programs_per_sm in (config.programs_per_sm, 2 * config.programs_per_sm):
            chosen = replace(config, programs_per_sm=programs_per_sm)
            name = "tile {block_n}, {num_warps} warps, {num_stages} stages, {programs_per_sm} a SM"
            name = name.format(**vars(chosen))

            def time_it(name=name, chosen=chosen):
                def call():
                    kernels.decode_attention(a, kv, None, 128**-0.5, config=chosen)

                ms = statistics.median(machine.times_ms(call))
                share = nbytes / ms * 1e3 / bandwidth
                results.add("tuning", name, "share of copy", share, "")

            if not machine.is_late(TIMINGS_END_S, name):
                results.attempt("tuning", name, time_it)


def run_timings(machine: Machine, results: Results) -> None:
    bandwidth = copy_bandwidth(machine, results)
    for part in (time_quantizing, time_attention, time_candidates):
        results.attempt("timing", part.__name__, part, machine, results, bandwidth)
        machine.clear()


# --- 3. Qwen's tables -------------------------------------------------------------------------


def random_model(machine: Machine) -> Qwen2ForCausalLM:
    """Of Qwen-7B's shape, bf16. Made on the device: only there is room, and time, for it."""
    config = Qwen2Config(**machine.sizes.model, dtype="bfloat16")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=machine.device).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02)
    rotary = model.model.rotary_emb  # its buffers are computed, not loaded
    model.model.rotary_emb = type(rotary)(config=config).to(machine.device)
    return model


def fill(cache, model, batch: int, n_tokens: int) -> None:
    """Random K and V in every layer, as a prompt of n_tokens would leave them."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, n_tokens, size)
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, dtype=torch.bfloat16, device=model.device) for _ in range(2))
        cache.update(k, v, layer)


@torch.no_grad()
def decode_row(machine: Machine, model, cache, batch: int, length: int) -> dict[str, float]:
    """N_STEPS single tokens fill `cache` to `length`: milliseconds a step, bytes at the peak."""
    fill(cache, model, batch, length - N_STEPS)
    machine.synchronize()
    machine.clear()
    token = torch.zeros(batch, 1, dtype=torch.long, device=machine.device)
    times = []
    for _ in range(N_STEPS):
        machine.synchronize()
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        machine.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    assert cache.get_seq_length() == length
    return {
        "ms": statistics.median(times),
        "peak": machine.peak_nbytes(),
        "device": machine.device_nbytes(),
    }


def measure_row(machine: Machine, results: Results, model, batch: int, length: int) -> None:
    """Both caches, and beside each what Qwen published for its own."""
    case = f"Qwen-7B's shape, batch {batch}, {length} tokens"
    for name in ("bf16", "int8"):
        model.set_attn_implementation("sdpa")
        if name == "int8":
            enable_int8_attention(model)
            cache = Int8Cache(model.config, reserve=length)
        else:
            cache = DynamicCache(config=model.config)
        try:
            row = decode_row(machine, model, cache, batch, length)
        except torch.OutOfMemoryError:
            row = None
        del cache
        machine.clear()
        if row is None:
            target, met = beside(name, PUBLISHED.get((batch, length)), float("inf"))
            results.add("table", case, f"{name} out of memory", 1, "", target, met)
            continue
        results.add("table", case, f"{name} step", row["ms"], "ms")
        results.add("table", case, f"{name} tokens a second", batch / row["ms"] * 1e3, "")
        if machine.cuda:
            peak = row["peak"] / GIB
            target, met = beside(name, PUBLISHED.get((batch, length)), peak)
            results.add("table", case, f"{name} peak", peak, "GiB", target, met)
            results.add("table", case, f"{name} device", row["device"] / GIB, "GiB")


def beside(name: str, published: tuple | None, peak: float) -> tuple[str, bool | None]:
    """The target column, and whether it is met: ours has to be below Qwen's int8, not its bf16."""
    if published is None:
        return "", None
    bf16, int8 = published
    if name == "bf16":
        return f"Qwen's {bf16 or 'failed'}", None
    return f"< {int8}", peak < int8


@torch.no_grad()
def generate_in_full(machine: Machine, results: Results, model) -> None:
    """One row of the tables without the short cut: generate, from a prompt of 16 tokens on."""
    n_tokens = 1024 if machine.cuda else 24
    enable_int8_attention(model)
    cache = Int8Cache(model.config, reserve=n_tokens)
    prompt = torch.randint(0, 500, (1, 16), device=machine.device)
    machine.clear()
    start = time.perf_counter()
    out = model.generate(
        prompt, past_key_values=cache, do_sample=False, max_new_tokens=n_tokens - 16,
        min_new_tokens=n_tokens - 16, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    machine.synchronize()
    seconds = time.perf_counter() - start
    case = f"Qwen-7B's shape, {out.shape[1]} tokens generated"
    results.add("table", case, "int8 tokens a second", (n_tokens - 16) / seconds, "")
    if machine.cuda:
        results.add("table", case, "int8 peak", machine.peak_nbytes() / GIB, "GiB")
        results.add("table", case, "int8 device", machine.device_nbytes() / GIB, "GiB")


def run_tables(machine: Machine, results: Results) -> None:
    model = random_model(machine)
    n_weights = sum(p.numel() for p in model.parameters())
    results.add("table", "Qwen-7B's shape", "weights", 2 * n_weights / GIB, "GiB")
    with torch.no_grad():  # libraries load, and take their memory, before anything is counted
        model(torch.zeros(1, 4, dtype=torch.long, device=machine.device))
    for batch, length in machine.sizes.rows:
        case = f"batch {batch}, {length} tokens"
        if not machine.is_late(TABLES_END_S, case):
            results.attempt("table", case, measure_row, machine, results, model, batch, length)
            machine.clear()
    if not machine.is_late(TABLES_END_S, "generate"):
        results.attempt("table", "generate", generate_in_full, machine, results, model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes; needs no CUDA")
    parser.add_argument("--only", choices=list(PARTS), help="one part alone")
    parser.add_argument("--csv", type=Path, help="[default: benchmarks/kv_cache.csv; --tiny: none]")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        print("There is no CUDA device here. --tiny runs the same steps at toy sizes on the CPU.")
        return 2
    torch.manual_seed(0)
    machine = Machine(TINY if args.tiny else FULL)
    path = args.csv or (None if args.tiny else BENCHMARKS / "kv_cache.csv")
    results = Results(path, machine, args.only)
    print(machine.name)
    if args.only in (None, "checks"):
        run_checks(machine, results)
    if not results.count(part="check", verdict="MISSED"):
        for name, run in (("timings", run_timings), ("tables", run_tables)):
            if args.only in (None, name):
                results.attempt(name.removesuffix("s"), name, run, machine, results)
    n_checks = results.count(part="check", verdict="MISSED")
    print(
        f"{len(results.rows)} rows{f' in {path}' if path else ''} after {machine.elapsed_s:.0f} s; "
        f"{results.count(verdict='MISSED')} missed, of them {n_checks} checks and "
        f"{results.n_failed} that failed"
    )
    return 1 if n_checks or results.n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
