"""Measurements to draw: made up, with a few bad weights that stand out."""

import math
import random

from quant.report.figures import Panel, Point

KINDS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}

HOSTILE = "</title></svg><script>document.title='hit'</script><img src=x onerror=\"document.title"
HOSTILE += "='hit'\">'&amp;${{7*7}}$^2\x1b[2J\u202e\n"
"""A model's name that would break out of HTML, SVG, mathtext, a template or a terminal."""


def measured(n_layers: int, name: str = "tiny", prefix: str = "model") -> dict:
    """The JSON of a Sensitivity, in which layer 0's down_proj and layer 1's qkv stand out."""
    draw = random.Random(7)
    modules, groups = {}, {}
    for layer in range(n_layers):
        for kind, members in KINDS.items():
            bad = 30 if (layer, kind) in ((0, "down"), (1, "qkv")) else 1
            parent = "self_attn" if kind in ("qkv", "o") else "mlp"
            path = f"{prefix}.layers.{layer}.{parent}"
            names = [f"{path}.{member}_proj" for member in members]
            for module in names:
                modules[module] = {
                    "shape": [256, 256],
                    "weight": 0.0085 * math.exp(draw.gauss(0, 0.05)),
                    "activation": bad * 0.005 * math.exp(draw.gauss(0, 0.3)),
                }
            groups[f"{path}.{kind}_proj"] = {
                "kind": kind,
                "layer": layer,
                "modules": names,
                "weight": 0.0085,
                "activation": bad * 0.005,
                "kld": bad * 1e-4 * math.exp(draw.gauss(0, 0.3)),
            }
    return {
        "qwq_quant": "0.2.0",
        "format": 1,
        "model": {
            "name": name,
            "revision": "0123456789abcdef",
            "architecture": "Qwen2ForCausalLM",
            "fingerprint": "ab" * 32,
            "sample": "cd" * 32,
        },
        "calibration": {
            "name": name,
            "sha256": "cd" * 32,
            "n_tokens": 65536,
            "seq_len": 512,
            "seed": 0,
        },
        "quantization": {
            "quant_type": "nf4",
            "blocksize": 64,
            "double_quant": True,
            "search_scales": False,
        },
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "modules": modules,
        "groups": groups,
    }


def panels(n_layers: int, prefix: str = "model") -> list[Panel]:
    """Activation and weight errors of every module of `measured`; the bad ones are kept."""
    data = measured(n_layers, prefix=prefix)
    return [
        Panel(
            metric,
            f"{metric} error",
            "relative squared error",
            tuple(
                Point(
                    module,
                    group["layer"],
                    module.rpartition(".")[2].removesuffix("_proj"),
                    data["modules"][module][metric],
                    kept=group["activation"] > 0.04,
                )
                for group in data["groups"].values()
                for module in group["modules"]
            ),
        )
        for metric in ("activation", "weight")
    ]


def group_panel(n_layers: int, threshold: float | None = 0.04) -> Panel:
    """What decided: of groups, with the least that is kept."""
    unit = "relative squared error"
    points = tuple(group_points(n_layers))
    return Panel("activation", "activation error", unit, points, threshold, level="group")


def group_points(n_layers: int) -> list[Point]:
    groups = measured(n_layers)["groups"]
    return [
        Point(name, g["layer"], g["kind"], g["activation"], g["activation"] > 0.04)
        for name, g in groups.items()
    ]


def curve(n: int = 20) -> list[tuple[int, float]]:
    """(nbytes, damage): from 6.6 MB to 13.6 MB, the first bytes buy most."""
    return [(6_600_000 + i * 7_000_000 // n, 2.0 * (1 - i / n) ** 3) for i in range(n + 1)]
