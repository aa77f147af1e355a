"""Qwen-7B's quantized `layer_past`, ((qk, sk, zk), (qv, sv, zv)) a layer, to and from Int8Cache."""

from collections.abc import Sequence

import torch
from qwq_kernels.kv_int8 import ChannelScales, dequantize
from qwq_kernels.qwen_kv import Quantized, dequantize_cache_torch, quantize_cache_v

from quant.display import printable
from quant.errors import BadInput, UsageError
from quant.kv_cache.cache import Int8Cache

LayerPast = tuple[Quantized, Quantized]


def to_layer_past(cache: Int8Cache) -> list[LayerPast]:
    """One tuple a layer. What the cache stores is one of Qwen's formats already, with 128 as zero
    point, and is passed on as it is; keys with channel scales and 4-bit values are quantized anew.

    Raises BadInput for a cache with layers of other kinds, or without tokens.
    """
    if len(cache.int8_layers) != len(cache.layers) or not cache.get_seq_length():
        raise BadInput(
            "This cache cannot be given as layer_past tuples.",
            "It holds no tokens, or has layers that are not int8.",
            "",
        )
    return [
        (
            _to_qwen(kv.k, kv.k_scale, kv.channels, kv.length),
            _to_qwen(kv.v, kv.v_scale, None, kv.length),
        )
        for kv in (layer.kv for layer in cache.int8_layers)
    ]


def _to_qwen(
    q: torch.Tensor, scale: torch.Tensor, channels: ChannelScales | None, length: int
) -> Quantized:
    q, scale = q[:, :, :length], scale[..., :length]
    if channels is not None or scale.shape[2] != 1:
        return quantize_cache_v(dequantize(q, scale, channels=channels), 8, 255, 0)
    scale = scale.squeeze(2)[..., None].contiguous()  # (batch, heads, tokens, 1)
    return q.contiguous(), scale, torch.full_like(scale, 128)


def from_layer_past(
    layer_past: Sequence[LayerPast], config, dtype: torch.dtype | None = None, **options
) -> Int8Cache:
    """An Int8Cache(config, **options) with those tokens, rounded once more to its own scales.

    dtype: the model's, if the tuples' scales have another. Raises BadInput for other tuples,
    UsageError for what are none.
    """
    _check_is_sequence(layer_past, "layer_past")
    cache = Int8Cache(config, **options)
    if len(layer_past) != len(cache.layers):
        raise BadInput(
            f"{len(layer_past)} tuples of layer_past for a model of {len(cache.layers)} layers.",
            "",
            "Give the config of the model that they came from.",
        )
    for i, layer in enumerate(layer_past):
        _check_is_sequence(layer, f"Layer {i} of layer_past")
        if len(layer) != 2 or not all(map(_is_quantized, layer)):
            raise BadInput(
                f"Layer {i} of layer_past is not ((qk, sk, zk), (qv, sv, zv)).",
                "Only quantized ones are, with qk (batch, heads, tokens, head_size) in uint8 and "
                "sk, zk (batch, heads, tokens, 1).",
                "Let the model that makes them run with use_cache_quantization.",
            )
        k, v = (dequantize_cache_torch(*part) for part in layer)
        cache.update(k.to(dtype or k.dtype), v.to(dtype or v.dtype), i)
    return cache


def _check_is_sequence(x, name: str) -> None:
    """Raise UsageError for None, which a model has for each layer before its first step, etc."""
    if not isinstance(x, Sequence):
        raise UsageError(
            f"{name} is a {printable(type(x).__name__)}.",
            "Expected is a list with ((qk, sk, zk), (qv, sv, zv)) for each layer.",
            "Let the model that makes them run first, with use_cache_quantization.",
        )


def _is_quantized(part) -> bool:
    """Whether it is (q, scale, zero_point) of the same tokens."""
    if not isinstance(part, Sequence):
        return False
    if len(part) != 3 or not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in part):
        return False
    q, scale, zero_point = part
    return q.dtype == torch.uint8 and scale.shape == zero_point.shape == (*q.shape[:3], 1)
