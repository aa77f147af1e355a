"""The centre and range of every channel of K: measured once, kept in a file beside the model.

    mid = (max + min) / 2                       over all tokens of a calibration run
    range = (max - min) / 2 / its largest       of a head; at least 2^-10

Attention is blind to both (kv_int8.py says why), so a poor measurement costs accuracy, never
correctness. Dividing by a head's largest keeps the queries, which are multiplied by it, in float16.

The file is safetensors: float32 `layers.N.k_mid` and `layers.N.k_range` (heads, head_size) for each
layer N of full attention, with "format" = "qwq-kv-scales" and "model_type" in its metadata.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from qwq_kernels.kv_int8 import ChannelScales
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from quant.display import printable
from quant.durable import write_whole
from quant.errors import BadInput, InputMissing, UsageError

FORMAT = "qwq-kv-scales"

LEAST_RANGE = 2.0**-10
"""Of a head's largest. A channel that never moved in calibration may move later."""

MAX_MAGNITUDE = 1e6
"""More is refused: no key is 1e6, and squares of 1e20 are infinite."""

_NAME = re.compile(r"layers\.(\d{1,5})\.k_(mid|range)")


@dataclass(frozen=True)
class KvScales:
    """What Int8Cache(config, scales=...) takes: layer number -> scales of its channels."""

    model_type: str
    layers: dict[int, ChannelScales]


# --- measuring --------------------------------------------------------------------------------


class _Recorder(CacheLayerMixin):
    """Stores nothing but the largest and smallest key of every channel, (heads, head_size)."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.largest: torch.Tensor | None = None
        self.smallest: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[2]:
            largest = key_states.detach().float().amax((0, 2))
            smallest = key_states.detach().float().amin((0, 2))
            if self.largest is not None:
                largest = torch.maximum(largest, self.largest)
                smallest = torch.minimum(smallest, self.smallest)
            self.largest, self.smallest = largest, smallest
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.largest = self.smallest = None

    def seen(self) -> list[list[list[float]]]:
        """What was recorded, as JSON."""
        return [self.largest.tolist(), self.smallest.tolist()]

    def restore(self, seen: list[list[list[float]]]) -> None:
        """What another one had seen."""
        self.largest, self.smallest = (torch.tensor(each) for each in seen)

    def scales(self) -> ChannelScales:
        half = (self.largest - self.smallest) / 2  # (heads, head_size)
        top = half.amax(-1, keepdim=True)
        top = torch.where(top > 0, top, 1.0)
        mid = (self.largest + self.smallest) / 2
        return ChannelScales(mid.cpu(), (half / top).clamp_min(LEAST_RANGE).cpu())


class RecordingCache(Cache):
    """`past_key_values` of a calibration run: every sequence goes through as if it were the first.

    Give it to the whole model, `model(tokens, past_key_values=cache)`, or to its decoder layers one
    by one; the keys are those after rotary embedding. Padding counts like tokens: use none.
    """

    def __init__(self, config):
        text_config = config.get_text_config(decoder=True)
        self.model_type = text_config.model_type
        layers = DynamicCache(config=text_config).layers
        super().__init__(
            layers=[_Recorder() if type(x) is DynamicLayer else x for x in layers],
        )

    def scales(self) -> KvScales:
        """What was measured. Raises UsageError if some layer saw no token."""
        recorders = {i: x for i, x in enumerate(self.layers) if isinstance(x, _Recorder)}
        unseen = [i for i, recorder in recorders.items() if recorder.largest is None]
        if unseen or not recorders:
            raise UsageError(
                f"Layer {unseen[0]} saw no key." if unseen else "No layer has full attention.",
                "",
                "Run the model with this cache as past_key_values first.",
            )
        return KvScales(self.model_type, {i: x.scales() for i, x in recorders.items()})


# --- files ------------------------------------------------------------------------------------


def write_scales(path: Path, scales: KvScales) -> None:
    """Whole or not at all. Raises CannotCreate or OutputFailed."""
    write_whole(path, encode_scales(scales))


def encode_scales(scales: KvScales) -> bytes:
    """The file."""
    tensors = {}
    for i, channels in scales.layers.items():
        tensors[f"layers.{i}.k_mid"] = channels.mid.float().contiguous()
        tensors[f"layers.{i}.k_range"] = channels.range.float().contiguous()
    metadata = {"format": FORMAT, "model_type": scales.model_type}
    return _in_order(save(tensors, metadata=metadata))


def _in_order(file: bytes) -> bytes:
    """A safetensors file with a header in order; the library's is another in every process."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(
        json.loads(file[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return file[:8] + header.encode().ljust(end - 8) + file[end:]


def read_scales(path: Path) -> KvScales:
    """Raises InputMissing, or BadInput for whatever is no file of scales."""
    if not path.is_file():
        raise InputMissing(
            f"There is no file {printable(path)}.",
            "",
            "Make it: qwq-quant kv-calibrate MODEL -o kv-scales.safetensors",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _bad_file(path, f"It cannot be read: {printable(error)}") from None
    if metadata.get("format") != FORMAT:
        raise _bad_file(path, f"Its format is not {FORMAT}")
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if not match:
            raise _bad_file(path, f"It holds a tensor named {printable(name)}")
        why = _why_no_scale(match[2], tensor)
        if why:
            raise _bad_file(path, f"{name} {why}")
        parts.setdefault(int(match[1]), {})[match[2]] = tensor
    for i, pair in parts.items():
        if pair.keys() != {"mid", "range"} or pair["mid"].shape != pair["range"].shape:
            raise _bad_file(path, f"Layer {i} lacks one of k_mid and k_range, or they differ")
    if not parts:
        raise _bad_file(path, "It holds no layer")
    layers = {i: ChannelScales(pair["mid"], pair["range"]) for i, pair in sorted(parts.items())}
    return KvScales(metadata.get("model_type", ""), layers)


def _bad_file(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{printable(path)} holds no scales of keys.",
        f"{why}.",
        "Make it: qwq-quant kv-calibrate MODEL -o kv-scales.safetensors",
    )


def _why_no_scale(kind: str, x: torch.Tensor) -> str:
    """Why x cannot be the "mid" or "range" of a layer, or an empty string."""
    if x.dtype != torch.float32 or x.ndim != 2 or not x.numel():
        return f"is {x.dtype} {tuple(x.shape)}"
    if not torch.isfinite(x).all() or x.abs().max() > MAX_MAGNITUDE:
        return "holds numbers that no key has"
    if kind == "range" and not (x >= LEAST_RANGE / 2).all():
        return f"holds numbers below {LEAST_RANGE / 2:.2g}"
    return ""


def _check_contents(scales: KvScales) -> None:
    """Raise BadInput, as for a file, for scales that were made in Python and cannot be any."""
    for i, channels in scales.layers.items():
        mid, half = channels.mid, channels.range
        parts = {"k_mid": _why_no_scale("mid", mid), "k_range": _why_no_scale("range", half)}
        why = ", ".join(f"{name} {part}" for name, part in parts.items() if part)
        if not why and mid.shape != half.shape:
            why = f"k_mid is {tuple(mid.shape)}, k_range {tuple(half.shape)}"
        if why:
            raise BadInput(
                "These are no scales of keys.",
                f"Layer {i}: {why}.",
                "Make them: qwq-quant kv-calibrate MODEL -o kv-scales.safetensors",
            )


def check_scales(scales: KvScales, text_config, full: Iterable[int]) -> None:
    """Raise UsageError unless `scales` are those of this model's full-attention layers, BadInput
    if they are none at all."""
    _check_contents(scales)
    full = list(full)
    heads = getattr(text_config, "num_key_value_heads", None)
    why = ""
    if scales.model_type != text_config.model_type:
        why = f"They are of a {printable(scales.model_type)}, this is a {text_config.model_type}"
    elif sorted(scales.layers) != full:
        why = f"They are of {len(scales.layers)} layers, this has {len(full)} of full attention"
    elif heads is not None and any(x.mid.shape[0] != heads for x in scales.layers.values()):
        n = next(iter(scales.layers.values())).mid.shape[0]
        why = f"They are of {n} key heads, this has {heads}"
    if why:
        raise UsageError(
            "These scales belong to another model.",
            f"{why}.",
            "Make this one's: qwq-quant kv-calibrate MODEL -o kv-scales.safetensors",
        )
