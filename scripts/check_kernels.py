"""What the compiler made of the kernels: registers, spills, instructions. Needs no GPU.

    python scripts/check_kernels.py [--arch 80 90] [--quick]

Every kernel is compiled ahead of time for sm_80 (A100) and sm_90 (H100, H200) by the ptxas that
Triton brings, and its machine code is read back. `instr` counts its instructions, `loop` those of
the inner loop, and `/elem` the latter for every element of K and V that it reads. Memory hands each
multiprocessor of an H200 some 17 int8 elements a clock, and it has 128 lanes: with 7 instructions
an element arithmetic is as slow as memory, so 3.5 leave half of it idle. A limit that is not kept
is named below its line, and the exit code is 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from qwq_kernels import decode_attention as decode_contract
from qwq_kernels import decode_attention_triton as decode
from qwq_kernels import kv_int8_triton as kv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)

MAX_INSTRUCTIONS = 3.5
"""Of the decode loop, for every element of K and V."""

MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have."""


@dataclass(frozen=True)
class Build:
    """One kernel with everything fixed that is fixed when it is launched."""

    name: str
    kernel: object
    pointers: dict[str, str]  # argument -> element type
    constants: dict[str, object]
    options: dict[str, object]
    floats: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()  # integers that need not be multiples of 16
    head_size: int = 0
    n_elements: float = 0.0  # of K and V, for each thread and turn of the inner loop; 0: no limit


@dataclass(frozen=True)
class Machine:
    """The machine code of a build."""

    registers: int
    stack: int
    local: int
    shared: int
    loop: list[str]  # the inner loop's instructions
    code: list[str] = field(repr=False)

    @property
    def spills(self) -> int:
        return sum(op.startswith(("LDL", "STL")) for op in self.code)

    @property
    def byte_loads(self) -> int:
        """Loads of single bytes from shared memory in the inner loop."""
        return sum(op.startswith(("LDS.U8", "LDS.S8")) for op in self.loop)


def _decode_build(name: str, head_size: int, n_rows: int, **changed) -> Build:
    changed = {"N_QUERIES": 1, "V_BITS": 8, "RANGED": False, "MASK": decode.MASK_NONE,
               "CAUSAL": False, "SPLIT": True} | changed  # fmt: skip
    config = changed.pop("config", None) or decode.config_of(head_size)
    block_r = decode.block_r(n_rows, head_size, changed["V_BITS"], changed["MASK"])
    constants = changed | decode.sizes_of(head_size, changed["V_BITS"], config) | {
        "GROUP": n_rows // changed["N_QUERIES"], "BLOCK_R": block_r,
        "ROW_BLOCKS": -(-n_rows // block_r), "ASM": True,
    }  # fmt: skip
    pointers = {
        "a_ptr": "bf16", "k_ptr": "u8", "k_scale_ptr": "fp32", "v_ptr": "u8",
        "v_scale_ptr": "fp32", "range_ptr": "fp32", "out_ptr": "bf16", "part_ptr": "fp32",
        "mask_ptr": "fp32",
        "largest_ptr": "fp32", "total_ptr": "fp32",
    }  # fmt: skip
    elements = 2 * config.block_n * head_size
    return Build(
        name, decode.split_kernel, pointers, constants,
        {"num_warps": config.num_warps, "num_stages": config.num_stages} | decode.SPLIT_OPTIONS,
        floats=("scaling",),
        unaligned=(
            "length", "tokens_per_split", "n_splits", "heads", "stride_mb", "stride_mh", "stride_mq"
        ),
        head_size=head_size,
        n_elements=elements / (32 * config.num_warps),
    )  # fmt: skip


def _kv_build(name: str, kernel, head_size: int, dtype: str, centred: bool, bits: int) -> Build:
    block = kv.block_size(head_size)
    value_block = kv.block_size(head_size * bits // 8)
    every = {
        "k_ptr": dtype, "v_ptr": dtype, "x_ptr": dtype, "out_ptr": dtype, "q_ptr": "u8",
        "kq_ptr": "u8", "vq_ptr": "u8", "scale_ptr": "fp32", "k_scale_ptr": "fp32",
        "v_scale_ptr": "fp32", "mid_ptr": "fp32", "inverse_ptr": "fp32", "range_ptr": "fp32",
    }  # fmt: skip
    constants = {
        "K_SIZE": head_size, "K_BLOCK": block, "CENTRED": centred, "V_SIZE": head_size,
        "V_BLOCK": value_block, "V_BITS": bits, "D": head_size, "BLOCK": value_block,
        "BITS": bits, "ROWS": kv.ROWS, "stride_kd": 1, "stride_vd": 1, "stride_xd": 1,
    }  # fmt: skip
    names = kernel.arg_names
    return Build(
        name, kernel,
        {n: t for n, t in every.items() if n in names},
        {n: value for n, value in constants.items() if n in names},
        kv.OPTIONS,
        unaligned=("n_rows", "n_heads", "n_new", "n_tokens", "start"),
        head_size=head_size,
    )  # fmt: skip


def _join_build(head_size: int, block_s: int) -> Build:
    return Build(
        f"join of {block_s} parts", decode.join_kernel,
        {"part_ptr": "fp32", "largest_ptr": "fp32", "total_ptr": "fp32", "out_ptr": "bf16"},
        {"D": head_size, "BLOCK_D": triton.next_power_of_2(head_size), "BLOCK_S": block_s},
        {"num_warps": 4} | decode.OPTIONS,
        unaligned=("n_splits", "n_heads", "n_queries"),
        head_size=head_size,
    )  # fmt: skip


HEAD_SIZES = range(16, decode_contract.MAX_HEAD_SIZE + 1, 16)

_TOKENS = {"MASK": decode.MASK_TOKENS, "RANGED": True}
_DRAFTS = {"N_QUERIES": 5, "CAUSAL": True}
_ROWS = {"N_QUERIES": 5, "MASK": decode.MASK_ROWS}
_NIBBLES = {"V_BITS": 4}

MAIN = {  # variants of the decode kernel, for every head size: rows, what differs from the plainest
    "decode": (7, {}),
    "decode, padding": (8, _TOKENS),
    "decode, 5 drafts, padding": (35, _TOKENS | _DRAFTS),
    "decode, mask of each query": (35, _ROWS),
    "decode, 4 bits": (7, _NIBBLES),
    "decode, 4 bits, drafts, pad.": (40, _NIBBLES | _TOKENS | _DRAFTS),
}
CORNERS = {  # for CORNER_SIZES besides
    "decode, 1 head, whole": (1, {"SPLIT": False}),
    "decode, padding, whole": (8, _TOKENS | {"SPLIT": False}),
    "decode, 16 heads, whole": (16, {"SPLIT": False, "RANGED": True}),
    "decode, 5 drafts": (20, _DRAFTS),
    "decode, 1 head, query masks": (5, _ROWS | {"RANGED": True, "SPLIT": False}),
    "decode, 4 bits, padding": (8, _NIBBLES | _TOKENS | {"SPLIT": False}),
    "decode, 4 bits, query masks": (35, _NIBBLES | _ROWS),
}
CORNER_SIZES = (64, 80, 128, 256)

QUICK = {  # what the tests compile: a variant -> head sizes
    "decode": (48, 80, 128),
    "decode, padding": (32, 64, 112, 128, 256),
    "decode, 5 drafts, padding": (64,),
    "decode, mask of each query": (160,),
    "decode, 4 bits, drafts, pad.": (128,),
    "join of 64 parts": (128,),
    "append, channel scales": (16, 80),
    "append, 4 bits": (64,),
    "quantize": (128,),
    "dequantize, channel scales": (240,),
}


def builds() -> list[Build]:
    """What is launched, for every head size."""
    found = []
    for size in HEAD_SIZES:
        variants = MAIN | (CORNERS if size in CORNER_SIZES else {})
        for name, (n_rows, changed) in variants.items():
            bits = changed.get("V_BITS", 8)
            if size >= decode_contract.MIN_HEAD_SIZE[bits] and size % (128 // bits) == 0:
                found.append(_decode_build(name, size, n_rows, **changed))
    for size in HEAD_SIZES:
        if size >= decode_contract.MIN_HEAD_SIZE[8]:
            found.append(_join_build(size, 64))
        found += [
            _kv_build("append", kv.append_kernel, size, "bf16", False, 8),
            _kv_build("append, channel scales", kv.append_kernel, size, "fp32", True, 8),
            _kv_build("quantize", kv.quantize_kernel, size, "bf16", True, 8),
            _kv_build("dequantize", kv.dequantize_kernel, size, "bf16", False, 8),
            _kv_build("dequantize, channel scales", kv.dequantize_kernel, size, "bf16", True, 8),
        ]
        if size % 32 == 0:
            found += [
                _kv_build("append, 4 bits", kv.append_kernel, size, "fp16", False, 4),
                _kv_build("dequantize, 4 bits", kv.dequantize_kernel, size, "fp16", False, 4),
            ]
    return found


def quick_builds() -> list[Build]:
    return [build for build in builds() if build.head_size in QUICK.get(build.name, ())]


def compile_for(build: Build, architecture: int) -> Machine:
    """Compile without a GPU, and read the machine code back."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
            constants[(i,)] = build.constants[name]
        elif name in build.floats:
            signature[name] = "fp32"
        else:
            signature[name] = f"*{build.pointers[name]}" if name in build.pointers else "i32"
            if name not in build.unaligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=dict(build.options)
    )
    return read_machine_code(compiled.asm["cubin"], compiled.metadata.shared)


def read_machine_code(cubin: bytes, shared: int) -> Machine:
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    count = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _cuobjdump(cubin, "-sass"))
    lines = [(int(address, 16), text) for address, text in lines]
    code = [_operation(text) for _, text in lines]
    return Machine(count["REG"], count["STACK"], count["LOCAL"], shared, _inner_loop(lines), code)


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _operation(text: str) -> str:
    """HMMA.16816.F32 of "@!P0 HMMA.16816.F32 R4, ..."."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _inner_loop(lines: list[tuple[int, str]]) -> list[str]:
    """Of the loops, between a backward branch and its target, that with asynchronous copies: it is
    the pipelined one. Empty where there is none."""
    found = []
    for address, text in lines:
        target = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            first = int(target[1], 16)
            body = [_operation(text) for at, text in lines if first <= at <= address]
            if any(op.startswith("LDGSTS") for op in body):
                found.append(body)
    return max(found, key=len, default=[])


def faults(build: Build, machine: Machine, architecture: int) -> list[str]:
    """The limits that are not kept."""
    found = []
    if machine.spills or machine.local or machine.stack:
        found.append(f"{machine.spills} spills, {machine.local} B local, {machine.stack} B stack")
    if machine.shared > MAX_SHARED[architecture]:
        found.append(f"{machine.shared} B shared")
    if build.n_elements:
        if not machine.loop:
            found.append("no pipelined loop")
        if machine.byte_loads:
            found.append(f"{machine.byte_loads} byte loads")
        if len(machine.loop) / build.n_elements > MAX_INSTRUCTIONS:
            found.append(f"more than {MAX_INSTRUCTIONS} instructions an element")
    return found


HEADER = ("sm", "kernel", "head", "regs", "spills", "local", "shared", "instr", "loop", "/elem")
NAME_WIDTH = 29  # the lines have 79 characters


def line(cells: tuple) -> str:
    """Numbers right-aligned below their heading, a space between any two."""
    first, name, *numbers = map(str, cells)
    aligned = (f"{x:>{len(head)}}" for x, head in zip(numbers, HEADER[2:], strict=True))
    return " ".join((first, f"{name:{NAME_WIDTH}}", *aligned)).rstrip()


def row(build: Build, machine: Machine, architecture: int) -> str:
    """A line of the table, and one more for each limit that is not kept."""
    per_element = f"{len(machine.loop) / build.n_elements:.2f}" if build.n_elements else ""
    numbers = (
        build.head_size, machine.registers, machine.spills, machine.local, machine.shared,
        len(machine.code), len(machine.loop), per_element,
    )  # fmt: skip
    found = faults(build, machine, architecture)
    return "\n   not kept: ".join((line((architecture, build.name, *numbers)), *found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="the part of it that the tests run")
    parser.add_argument("--loop", action="store_true", help="print the inner loops' instructions")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print(line(HEADER))
    n_faults = 0
    for architecture in args.arch:
        for build in quick_builds() if args.quick else builds():
            machine = compile_for(build, architecture)
            print(row(build, machine, architecture), flush=True)
            if args.loop and machine.loop:
                print("  ", dict(Counter(machine.loop).most_common()))
            n_faults += len(faults(build, machine, architecture))
    return 1 if n_faults else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("The interpreter compiles nothing: unset TRITON_INTERPRET.")
    sys.exit(main())
