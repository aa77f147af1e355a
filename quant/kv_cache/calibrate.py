"""Measures the channel scales of K with one decoder layer in memory, for Int8Cache(scales=...).

Each layer of a streamed model is called with a RecordingCache as its `past_key_values`: what it
stores there, keys after rotary embedding, is to the byte what an Int8Cache would have been given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from qwq_kernels.kv_int8 import check_head_size
from safetensors import SafetensorError, safe_open
from transformers.cache_utils import DynamicCache, DynamicLayer

from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedLayer, StreamedModel
from quant.calibration.tokens import Tokens
from quant.display import printable
from quant.errors import BadInput, CannotCreate
from quant.kv_cache.scales import FORMAT, MAX_MAGNITUDE, KvScales, RecordingCache
from quant.output_file import ELSEWHERE, check_output_file


def measure_kv_scales(
    model: StreamedModel,
    tokens: Tokens,
    progress: Callable[[int], None] = lambda layer: None,
    passes: Passes = UNKEPT,
) -> KvScales:
    """Centre and range of every channel of K, of the layers with full attention.

    Calls progress(layers done). Raises BadInput for a model that no Int8Cache can serve, or whose
    keys are not finite.
    """
    full = _full_layers(model.config)
    _check_possible(model.config, full)
    cache = RecordingCache(model.config)
    walk = passes.begin("keys", model.n_layers)
    for i, seen in enumerate(walk.facts):
        if seen is not None:
            cache.layers[i].restore(seen)
    hidden = model.embed(tokens.ids)
    if not walk.finished:
        walk.restore("hidden", hidden.tensor)
    if walk.n_done:
        progress(walk.n_done)
    for layer in model.layers(tokens.seq_len, n_done=walk.n_done):
        is_full = layer.index in full
        with recorded(layer, cache) if is_full else nullcontext():
            layer.run(hidden, hidden)
        seen = cache.layers[layer.index].seen() if is_full else None
        walk.done({"hidden": hidden.tensor}, facts=seen)
        progress(layer.index + 1)
    scales = cache.scales()
    _check_finite(scales)
    return scales


@contextmanager
def recorded(layer: StreamedLayer, cache: RecordingCache) -> Iterator[None]:
    """While it is open, the layer is called with `cache` as its past_key_values."""
    handle = layer.module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"past_key_values": cache}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _full_layers(config) -> frozenset[int]:
    """The layers that an Int8Cache stores: those that attend to every token."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return frozenset(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)


def _check_possible(config, full: frozenset[int]) -> None:
    """Raise BadInput, before the model is run, where an Int8Cache would refuse it afterwards."""
    why = "" if full else "None of its layers attends to all tokens"
    text_config = config.get_text_config(decoder=True)
    n_heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // n_heads
    try:
        check_head_size(size)
    except ValueError as error:
        why = f"Its keys have {error}"
    if why:
        raise BadInput(
            "An int8 cache cannot hold this model's keys, so there is nothing to calibrate.",
            f"{why}.",
            "Generate with transformers' own cache: leave out past_key_values.",
        )


def _check_finite(scales: KvScales) -> None:
    for i, channels in scales.layers.items():
        numbers = torch.stack([channels.mid, channels.range])
        if not torch.isfinite(numbers).all() or numbers.abs().max() > MAX_MAGNITUDE:
            raise BadInput(
                f"The keys of layer {i} are infinite, or so large that they may as well be.",
                "A layer at or below it is broken, or its numbers are too large for bfloat16.",
                "Look for the weight: qwq-quant doctor MODEL. Or compute with --device cpu.",
            )


def check_scales_output(path: Path, *, force: bool, sources: Iterable[Path]) -> None:
    """Refuse a place that must not be written to: with `force` too, all but files of scales.

    A model's weights have the same kind of file and may be one mistyped name away.
    Raises CannotCreate or UsageError.
    """
    check_output_file(path, force=force, sources=sources, starts_with=b"", kind="file of scales")
    if path.exists() and path.stat().st_size and not _holds_scales(path):
        raise CannotCreate(
            f"{printable(path)} exists and is no file of scales.",
            "Only a file of scales is replaced, even with --force.",
            ELSEWHERE,
        )


def _holds_scales(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):
        return False
