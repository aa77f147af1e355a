"""How fast each encoder is, and whether it was compiled already: known without loading one.

To time an encoder it has to be loaded, and numba takes 0.4 s for the first: more than a whole plan.
So the speeds are those of one core of the machine of benchmarks/quantize.csv and refine.csv, and
what another machine makes of them is for the caller to find out.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import quant.formats
from quant.formats import FORMATS
from quant.formats.format import Format
from quant.formats.sources import sources_digest


@dataclass(frozen=True)
class Speed:
    """Million weights a second of one core, and the names of the kernels."""

    plain: float
    weighted: float  # with an importance matrix
    refined: float  # either way: slower by up to a third without importance
    kernel: str
    refiner: str = ""


def _of_32(name: str, plain: float, weighted: float, refined: float) -> Speed:
    file = "refined_kernels_32"
    return Speed(plain, weighted, refined, f"legacy_kernels.encode_{name}", f"{file}.refine_{name}")


def _of_k(name: str, plain: float, weighted: float, refined: float) -> Speed:
    file = "refined_kernels_k"
    return Speed(plain, weighted, refined, f"k_kernels.encode_{name}", f"{file}.refine_{name}")


def _of_grid(kernel: str, speed: float, refined: float) -> Speed:
    return Speed(speed, speed, refined, f"iq_kernels_{kernel}", "refined_kernels_codebook.search")


SPEEDS = {
    "F16": Speed(7140, 7140, 7140, "dense_kernels.encode_float16"),
    "BF16": Speed(7970, 7970, 7970, "dense_kernels.encode_bfloat16"),
    "Q4_0": _of_32("q4_0", 4870, 570, 110),
    "Q4_1": _of_32("q4_1", 4140, 204, 82),
    "Q5_0": _of_32("q5_0", 3980, 560, 81),
    "Q5_1": _of_32("q5_1", 3860, 211, 79),
    "Q8_0": _of_32("q8_0", 3590, 3960, 139),
    "Q2_K": _of_k("q2_k", 381, 178, 58),
    "Q3_K": _of_k("q3_k", 718, 468, 121),
    "Q4_K": _of_k("q4_k", 362, 210, 61),
    "Q5_K": _of_k("q5_k", 426, 202, 64),
    "Q6_K": _of_k("q6_k", 560, 566, 95),
    "IQ1_S": _of_grid("iq1.encode_s", 66, 4),
    "IQ1_M": _of_grid("iq1.encode_m", 60, 4),
    "IQ2_XXS": _of_grid("iq2.encode_xxs", 26, 9),
    "IQ2_XS": _of_grid("iq2.encode_xs", 20, 8),
    "IQ2_S": _of_grid("iq2.encode_s", 24, 8),
    "IQ3_XXS": _of_grid("iq3.encode_xxs", 21, 7),
    "IQ3_S": _of_grid("iq3.encode_s", 25, 6),
    "IQ4_NL": Speed(213, 218, 32, "iq_kernels_iq4.encode", "refined_kernels_32.refine_iq4_nl"),
    "IQ4_XS": Speed(203, 202, 38, "iq_kernels_iq4.encode", "refined_kernels_k.refine_iq4_xs"),
    "TQ1_0": Speed(4700, 5030, 4700, "ternary_kernels.encode_tq1_0"),
    "TQ2_0": Speed(5550, 5870, 5550, "ternary_kernels.encode_tq2_0"),
}
"""Of every format but F32, which is a copy."""


def weights_per_second(format: Format, has_importance: bool) -> float:
    """Of one core of the benchmarks' machine; infinity for a copy."""
    speed = SPEEDS.get(format.name)
    if speed is None:
        return float("inf")
    if _is_refined(format):
        return 1e6 * speed.refined
    return 1e6 * (speed.weighted if has_importance else speed.plain)


def kernels_of(format: Format, has_importance: bool) -> tuple[str, ...]:
    """The kernels that encode it, "file.function": none, its own, and that which refines it."""
    speed = SPEEDS.get(format.name)
    if speed is None:
        return ()
    is_refined, own = _is_refined(format), speed.kernel
    if own.startswith("legacy_kernels") and has_importance and format.name != "Q8_0":
        own += "_weighted"
    return (own, speed.refiner) if is_refined and speed.refiner else (own,)


def kernels_to_compile(encoders: Iterable[tuple[Format, bool]]) -> set[str]:
    """What has to be compiled before these can be used: (format, has importance)."""
    kernels = {kernel for encoder in set(encoders) for kernel in kernels_of(*encoder)}
    return {kernel for kernel in kernels if not is_compiled(kernel)}


def is_compiled(kernel: str) -> bool:
    """Whether its machine code is kept on the disk, made of the sources as they are."""
    digest = sources_digest().encode()
    indexes = [path for folder in _caches() for path in folder.glob(f"{kernel}-*.nbi")]
    return any(digest in path.read_bytes() for path in indexes)


def _is_refined(format: Format) -> bool:
    return format is not FORMATS[format.name]


def _caches() -> list[Path]:
    """Where numba keeps machine code: where the user says, or beside the sources, or at home."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return list(Path(chosen).glob("formats_*"))
    beside = Path(quant.formats.__file__).parent / "__pycache__"
    return [beside, *(Path.home() / ".cache" / "numba").glob("formats_*")]
