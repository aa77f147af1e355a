"""Int8Cache: a cache for transformers that stores K and V in 8 bits (values in 4, if asked).

    bytes a token = layers x heads x (2 x head_size + 8)      bf16: layers x heads x 4 x head_size

0.52 of bf16 at head size 128, 0.53 at 64. Only layers of full attention are int8; sliding windows
and linear attention keep transformers' own layers, which are small.

The tokens of a prompt attend over their exact K and V, with whatever attention the model uses, and
are quantized only to be stored. Later steps see the stored tokens dequantized, and their own still
exact, with any attention function; or all in int8, where `enable_int8_attention` was called.

A step writes in place, into buffers with room for some tokens more; when they are full they grow by
1/32, 64 tokens at least, so that copying is at most 3 % of what attention reads in those steps.
`reserve` allocates in advance.
"""

import warnings
import weakref
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from qwq_kernels.kv_int8 import (
    DTYPES,
    ChannelScales,
    QuantizedKV,
    allocate,
    append,
    check_head_size,
    dequantize,
    token_nbytes,
)
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from quant.display import printable
from quant.errors import BadInput, Unavailable, UsageError
from quant.kv_cache.scales import KvScales, check_scales, read_scales

LEAST_GROWTH = 64  # tokens

ALIGNMENT = 16
"""Capacities are multiples of it, so that every row of scales starts at a multiple of 64 bytes."""

INT8_ATTENTION = "int8_kv_"
"""What the names of the attention functions that read int8 start with (attention.py)."""


@dataclass(frozen=True)
class Stored:
    """What the newest tokens of a step may attend to: a cache with them, and they themselves."""

    kv: QuantizedKV
    new_k: torch.Tensor  # (batch, heads, n_new, head_size)
    new_v: torch.Tensor

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V (batch, heads, length, head_size): the past dequantized, the newest as they are."""
        return self.exact_k(), self.exact_v()

    def exact_k(self) -> torch.Tensor:
        return self._exact(self.kv.k, self.kv.k_scale, self.kv.channels, self.new_k)

    def exact_v(self) -> torch.Tensor:
        return self._exact(self.kv.v, self.kv.v_scale, None, self.new_v)

    def _exact(
        self,
        q: torch.Tensor,
        scale: torch.Tensor,
        channels: ChannelScales | None,
        new: torch.Tensor,
    ) -> torch.Tensor:
        past = self.kv.length - new.shape[2]
        x = new.new_empty(*new.shape[:2], self.kv.length, new.shape[3])
        dequantize(q[:, :, :past], scale[..., :past], x.dtype, channels, x[:, :, :past])
        x[:, :, past:] = new
        return x


class Placeholder(torch.Tensor):
    """Passes through a model in place of K or V that lie in an int8 cache.

    It has their shape, dtype and device, and carries `stored` to the attention function that reads
    it. A model that computes with it before that (DeepSeek widens its keys) gets what it stands
    for, dequantized, and a warning.
    """

    stored: Stored
    is_key: bool

    @staticmethod
    def of(stored: Stored) -> "tuple[Placeholder, Placeholder]":
        return Placeholder._of(stored, stored.new_k), Placeholder._of(stored, stored.new_v)

    @staticmethod
    def _of(stored: Stored, new: torch.Tensor) -> "Placeholder":
        shape = (*new.shape[:2], stored.kv.length, new.shape[3])
        placeholder = torch.Tensor._make_subclass(Placeholder, new.new_empty(()).expand(shape))
        placeholder.stored, placeholder.is_key = stored, new is stored.new_k
        return placeholder

    def exact(self) -> torch.Tensor:
        return self.stored.exact_k() if self.is_key else self.stored.exact_v()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if _asks_for_a_fact(function):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "something")
        warn_once("this model", f"it calls {name} on keys or values after it has cached them")
        args, kwargs = tree_map(
            lambda x: x.exact() if isinstance(x, Placeholder) else x, (args, kwargs or {})
        )
        return function(*args, **kwargs)


_FACTS = {
    "device", "dim", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_floating_point", "is_leaf",
    "is_meta", "is_nested", "is_quantized", "is_sparse", "layout", "ndim", "requires_grad",
    "shape", "size", "stride", "__repr__",
}  # fmt: skip
"""What can be said of a tensor without looking at its contents."""


def _asks_for_a_fact(function) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__get__":  # of a property, such as x.shape; x.mT is one as well
        name = getattr(function.__self__, "__name__", "")
    return name in _FACTS


_warned: set[tuple[str, str]] = set()


def warn_once(who: str, why_not: str) -> None:
    """Say that int8 attention is not used by a class of modules, once for each reason."""
    if (who, why_not) not in _warned:
        _warned.add((who, why_not))
        warnings.warn(
            f"{printable(who)}: int8 attention is not used ({why_not}); the cache is dequantized "
            "for each step instead",
            stacklevel=3,
        )


class _ModelConfig:
    """The config of the model that a cache was made for, as long as that lives.

    A copy of the cache follows the same model; one that was pickled follows none.
    """

    def __init__(self, config=None):
        self._of = weakref.ref(config) if config is not None else None

    def attention(self) -> str:
        """The attention that the model uses now, or nothing."""
        config = self._of() if self._of is not None else None
        return getattr(config, "_attn_implementation", None) or ""

    def __deepcopy__(self, memo) -> "_ModelConfig":
        return self

    def __reduce__(self):
        return _ModelConfig, ()


class Int8Layer(CacheLayerMixin):
    """One layer's K and V in int8."""

    is_sliding = False
    is_croppable = True
    is_compileable = False  # its length is a number, not a tensor

    def __init__(
        self,
        config,
        channels: ChannelScales | None = None,
        value_bits: int = 8,
        reserve: int = 0,
    ):
        super().__init__()
        self._config = _ModelConfig(config)
        self.channels, self.value_bits, self.reserve = channels, value_bits, reserve
        self.kv: QuantizedKV | None = None

    # --- what transformers asks ---

    def get_seq_length(self) -> int:
        return self.kv.length if self.kv is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _check_possible(key_states, value_states, self.value_bits)
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.channels is not None:
            _check_channels(self.channels, key_states)
            self.channels = self.channels.to(self.device)
        self.kv = self._empty(key_states, value_states, _aligned(self.reserve))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens; return all K and V, or placeholders for them.

        Raises BadInput for what int8 cannot hold, UsageError for another model's keys.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        self._check_same(key_states, value_states)
        is_prompt = self.kv.length == 0
        self._make_room(self.kv.length + key_states.shape[2], key_states, value_states)
        self.kv = append(self.kv, key_states, value_states)
        if is_prompt:  # nothing but what is new, and that is here exactly
            return key_states, value_states
        stored = Stored(self.kv, key_states, value_states)
        if self._config.attention().startswith(INT8_ATTENTION):
            return Placeholder.of(stored)
        k, v = stored.exact()
        k.was_int8 = True  # for an attention function that would have read it
        return k, v

    # --- memory ---

    def _empty(self, k: torch.Tensor, v: torch.Tensor, capacity: int) -> QuantizedKV:
        return allocate(
            *k.shape[:2], capacity, k.shape[3], v.shape[3],
            value_bits=self.value_bits, channels=self.channels, device=self.device,
        )  # fmt: skip

    def _make_room(self, n_tokens: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if n_tokens <= self.kv.capacity:
            return
        old, n = self.kv, self.kv.length
        self.kv = replace(self._empty(k, v, _capacity(n_tokens)), length=n)
        for to, source, token_axis in zip(self.kv.buffers, old.buffers, (2, 3, 2, 3), strict=True):
            to.narrow(token_axis, 0, n).copy_(source.narrow(token_axis, 0, n))

    def _change(self, function) -> None:
        """Replace every buffer by a function of it."""
        if self.kv is None:
            return
        with torch.inference_mode(False):  # see allocate
            k, k_scale, v, v_scale = map(function, self.kv.buffers)
        self.kv = replace(self.kv, k=k, k_scale=k_scale, v=v, v_scale=v_scale)

    @property
    def nbytes(self) -> int:
        """Of the tokens that are stored."""
        if self.kv is None:
            return 0
        batch, heads, _, k_size = self.kv.k.shape
        v_size = self.kv.v.shape[3] * 8 // self.value_bits
        return batch * heads * self.kv.length * token_nbytes(k_size, v_size, self.value_bits)

    @property
    def nbytes_allocated(self) -> int:
        return sum(x.nbytes for x in self.kv.buffers) if self.kv is not None else 0

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu"))

    def prefetch(self) -> None:
        if self.kv is None or self.kv.k.device == self.device:
            return
        self._change(lambda x: x.to(self.device, non_blocking=True))
        if self.device.type == "cuda":  # transformers prefetches on a stream of its own
            stream = torch.cuda.default_stream(self.device)
            for x in self.kv.buffers:
                x.record_stream(stream)

    def reset(self) -> None:
        self.kv, self.is_initialized = None, False

    # --- beams, drafts, batches ---

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices, ...].contiguous())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; 0 and negative numbers, as in transformers."""
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}) of an int8 cache is not possible.",
                "transformers 5 counts the tokens to remove as a negative number.",
                f"Call crop({-tokens_to_remove}) to remove {tokens_to_remove} tokens.",
            )
        if self.kv is not None:
            self.kv = replace(self.kv, length=max(0, self.kv.length + tokens_to_remove))

    # --- checks ---

    def _check_same(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise UsageError unless k, v continue what is stored."""
        v_size = self.kv.v.shape[3] * 8 // self.value_bits
        for what, here, there in (
            ("batch size", k.shape[0], self.kv.k.shape[0]),
            ("number of key heads", k.shape[1], self.kv.k.shape[1]),
            ("key head size", k.shape[3], self.kv.k.shape[3]),
            ("value head size", v.shape[3], v_size),
            ("dtype", k.dtype, self.dtype),
            ("device", k.device, self.device),
        ):
            if here != there:
                raise UsageError(
                    f"This cache holds the tokens of something else: its {what} is {there}, "
                    f"what came now has {here}.",
                    "A cache goes on with the model, the batch and the dtype it began with.",
                    "Make a new one, or call its reset().",
                )


def _capacity(n_tokens: int) -> int:
    """Room for n_tokens, and for those of the next steps."""
    return _aligned(n_tokens + max(LEAST_GROWTH, n_tokens // 32))


def _aligned(n_tokens: int) -> int:
    return -(-n_tokens // ALIGNMENT) * ALIGNMENT


def _check_possible(k: torch.Tensor, v: torch.Tensor, value_bits: int) -> None:
    """Raise BadInput or Unavailable for keys and values that the kernels cannot store."""
    for what, x, bits in (("keys", k, 8), ("values", v, value_bits)):
        try:
            check_head_size(x.shape[-1], bits)
        except ValueError as error:
            raise BadInput(
                f"This model's {what} do not fit an int8 cache.",
                f"They have {error}.",
                "Generate with transformers' own cache: leave out past_key_values.",
            ) from None
        if x.dtype not in DTYPES:
            raise BadInput(
                f"This model's {what} are {x.dtype}.",
                "An int8 cache takes " + ", ".join(map(str, DTYPES)) + ".",
                "Load the model with dtype=torch.bfloat16.",
            )
    if k.is_cuda and find_spec("triton") is None:
        raise Unavailable(
            "An int8 cache on CUDA needs Triton, which is not installed.", "", "pip install triton"
        )


def _check_channels(channels: ChannelScales, k: torch.Tensor) -> None:
    here = (k.shape[1], k.shape[3])
    if tuple(channels.mid.shape) != here:
        raise UsageError(
            f"The scales are for {channels.mid.shape[0]} heads of {channels.mid.shape[1]}, "
            f"the model's keys are {here[0]} heads of {here[1]}.",
            "Scales belong to one model, which must not be split among machines by heads.",
            "Make the scales of this model: qwq-quant kv-calibrate MODEL -o kv-scales.safetensors",
        )


class Int8Cache(Cache):
    """`past_key_values` in int8: `model.generate(**inputs, past_key_values=Int8Cache(config))`.

    scales: channel scales of K, or a file of them; they cost nothing, and models with key biases
    (Qwen2, Qwen2.5) need them. value_bits: 8, or 4. reserve: tokens to allocate at once; it grows
    beyond. offloading: all but one layer lie in the computer's memory, as in transformers; CUDA.

    It can be copied and pickled; what comes out of a pickle is dequantized for each step, even
    after `enable_int8_attention`. Gradients reach the tokens of the present call, not those that
    earlier calls stored. Raises UsageError for settings that cannot be, and for scales of
    another model; BadInput for a model that it cannot serve.
    """

    def __init__(
        self,
        config,
        *,
        scales: KvScales | Path | str | None = None,
        value_bits: int = 8,
        reserve: int = 0,
        offloading: bool = False,
    ):
        if not isinstance(config, PreTrainedConfig):
            raise UsageError(
                f"An int8 cache cannot be made from a {printable(type(config).__name__)}.",
                "It takes the config of the model that will use it.",
                "Write Int8Cache(model.config)",
            )
        if value_bits not in (8, 4):
            raise UsageError(
                f"value_bits={value_bits} is not possible.", "", "Values take 8 bits, or 4."
            )
        if not isinstance(reserve, int) or reserve < 0:
            raise UsageError(
                f"reserve={printable(reserve)} is not possible.",
                "It is the number of tokens to make room for.",
                "Give a whole number, or leave it out.",
            )
        if offloading and not torch.cuda.is_available():
            raise UsageError(
                "offloading is not possible here.",
                "It moves layers between CUDA and the computer's memory, and there is no CUDA.",
                "Leave it out.",
            )
        if config.is_encoder_decoder:
            raise BadInput(
                "An int8 cache is for models with a decoder alone.",
                f"{config.model_type} has an encoder too.",
                "Generate with transformers' own cache: leave out past_key_values.",
            )
        text_config = config.get_text_config(decoder=True)
        if scales is not None and not isinstance(scales, KvScales):
            scales = read_scales(Path(scales))
        layers = DynamicCache(config=text_config).layers
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise BadInput(
                "This model has nothing that an int8 cache could store.",
                f"None of its {len(layers)} layers is one of full attention.",
                "Generate with transformers' own cache: leave out past_key_values.",
            )
        if scales is not None:
            check_scales(scales, text_config, full)
        for i in full:
            channels = scales.layers[i] if scales is not None else None
            layers[i] = Int8Layer(text_config, channels, value_bits, reserve)
        super().__init__(layers=layers, offloading=offloading)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Int8Layer.update. Raises UsageError for a model with more layers."""
        if layer_idx >= len(self.layers):
            raise UsageError(
                f"This cache has {len(self.layers)} layers, and the model's layer {layer_idx} "
                "wants to store something.",
                "It was made from another model's config.",
                "Make it from this one's: Int8Cache(model.config)",
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def int8_layers(self) -> list[Int8Layer]:
        return [layer for layer in self.layers if isinstance(layer, Int8Layer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens stored in int8."""
        return sum(layer.nbytes for layer in self.int8_layers)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffers, which have room for some tokens more."""
        return sum(layer.nbytes_allocated for layer in self.int8_layers)
