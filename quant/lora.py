"""A LoRA adapter (PEFT), merged into a checkpoint's weights as they are read: no merged copy first.

    w' = w + scaling * B @ A        B (out, r), A (r, in), scaling = alpha / r

Rows of w' need the same rows of B and all of A, so any rows can be read on their own, in the memory
they take. The tensors of a merged checkpoint carry the change (TensorInfo.change); the converter,
the streamed engine and the doctor read them like any others.

The weights are those of peft's `merge_and_unload`, for a model loaded in its stored type on a CPU,
to the last bit (r up to 192; above that, a few weights in a million differ in their last bit):

    adapter   widened to float32 when it is loaded (autocast_adapter_dtype)
    delta     float32(scaling) * (B @ A), in float32
    linear    w' = round(w + delta)                   rounded to the stored type once
    embedding w' = round(w + round(delta transposed)) twice

# ref: peft 0.21, tuners/lora/layer.py, Linear.merge and Embedding.merge
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from quant.checkpoint import Checkpoint, _inside
from quant.display import printable
from quant.errors import BadInput, InputMissing
from quant.finite import count_nonfinite
from quant.hub import resolve
from quant.lora_config import HEADS, MAX_NBYTES, LoraConfig, parse_lora_config
from quant.lora_config import NAME as CONFIG
from quant.safetensors_file import read_header
from quant.strict_files import open_regular
from quant.tensors import STORED_DTYPES, TensorInfo, TensorReader, to_float32

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

PREFIX = "base_model.model."
"""PEFT's two wrappers around the model, in every name of a saved adapter."""

PARTS = {
    "lora_A.weight": ("linear", "A"),
    "lora_B.weight": ("linear", "B"),
    "lora_embedding_A": ("embedding", "A"),
    "lora_embedding_B": ("embedding", "B"),
}
"""What follows the module's name -> on what kind of module, and which factor it is."""

DTYPES = ("F32", "F16", "BF16")
ROWS_AT_ONCE = 1 << 22  # weights of the adapter that are looked at together

N_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Origin:
    """Where merged weights come from."""

    folder: Path
    name: str  # what the user typed
    base_model: str  # as the adapter's maker named it

    @property
    def files(self) -> frozenset[Path]:
        return frozenset({self.folder / CONFIG, self.folder / WEIGHTS})


@dataclass(frozen=True)
class Adapter:
    """An adapter that was opened: its settings and its tensors' places. No weights were read."""

    origin: Origin
    config: LoraConfig
    tensors: dict[str, TensorInfo]  # by PEFT's names

    @property
    def name(self) -> str:
        """For messages."""
        return printable(self.origin.name)

    @cached_property
    def factors(self) -> dict[str, dict[str, TensorInfo]]:
        """Module -> its A and B, as {"A": ...}; one of the two may be missing."""
        found = {}
        for name, info in self.tensors.items():
            module, part = _split(name)
            if part in PARTS:
                found.setdefault(module, {})[PARTS[part][1]] = info
        return found

    @cached_property
    def whole(self) -> dict[str, TensorInfo]:
        """The model's tensor -> what was saved in its place.

        `modules_to_save`, trained biases, and copies of the embedding that PEFT saves unasked.
        """
        return {
            re.sub(r"\.base_layer(\.weight|\.bias)$", r"\1", name.removeprefix(PREFIX)): info
            for name, info in self.tensors.items()
            if _split(name)[1] not in PARTS
        }

    @property
    def changed(self) -> list[str]:
        """The model's tensors that it changes."""
        return sorted({f"{module}.weight" for module in self.factors} | self.whole.keys())


def _split(name: str) -> tuple[str, str]:
    """A tensor of the adapter as (module, part): (...q_proj, lora_A.weight)."""
    module, found, part = name.removeprefix(PREFIX).rpartition(".lora_")
    return module, f"lora_{part}" if found else ""


# --- opening ----------------------------------------------------------------------------------


def open_adapter(
    name: str, *, token: str | None = None, cache_dir: Path | None = None, offline: bool = False
) -> Adapter:
    """Find and open an adapter: a folder, or org/name[@revision] on the hub. Headers only.

    Raises BadInput for what is no plain LoRA, InputMissing, and what quant.hub.resolve raises.
    """
    if os.path.isfile(os.path.expanduser(name)):
        raise BadInput(
            f"{printable(name)} is a file, but an adapter is a folder.",
            f"{CONFIG} and {WEIGHTS} belong together.",
            "Give the folder that holds both.",
        )
    found = resolve(
        name, token=token, cache_dir=cache_dir, offline=offline, before_weights=_read_config
    )
    config = _read_config(found.path)
    weights = _inside(found.path, WEIGHTS)
    if weights is None:
        raise _no_weights(found.path)
    revision = f"@{found.revision[:12]}" if found.revision else ""
    origin = Origin(found.path, f"{found.name}{revision}", config.base_model)
    return Adapter(origin, config, read_header(weights)[0])


def _read_config(folder: Path) -> LoraConfig:
    path = _inside(folder, CONFIG)
    if path is None:
        raise InputMissing(
            f"{printable(folder)} holds no {CONFIG}, so it is no adapter of PEFT's.",
            "--lora takes an adapter, not a model.",
            "Give the folder that peft's save_pretrained() wrote.",
        )
    with open_regular(path) as file:
        raw = file.read(MAX_NBYTES + 1)
    if len(raw) > MAX_NBYTES:
        raise BadInput(f"{printable(path)} has over {MAX_NBYTES} bytes, so it is not read.")
    return parse_lora_config(raw, path)


def _no_weights(folder: Path) -> BadInput | InputMissing:
    if _inside(folder, PICKLE) is not None:
        return BadInput(
            f"{printable(folder)} holds {PICKLE}, but no {WEIGHTS}.",
            "A .bin is a Python pickle, which can run code when it is opened.",
            "Convert it once, in that folder: "
            'python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')\"",
        )
    return InputMissing(f"{printable(folder)} holds no {WEIGHTS}.")


# --- merging ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """scaling * B @ A, which is added to a matrix; of an embedding, it is added transposed."""

    a: TensorInfo  # linear: (r, in); embedding: (r, n_vocab)
    b: TensorInfo  # linear: (out, r); embedding: (hidden, r)
    scaling: float
    of_embedding: bool

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it fits."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.of_embedding else (out, into)

    def delta(self, reader: TensorReader, start: int, stop: int, dtype: str) -> np.ndarray:
        """Rows [start, stop) of what is added to a matrix of `dtype`, float32."""
        from quant.formats.low_rank_kernels import low_rank_product  # numba: 0.15 s

        out = np.empty((stop - start, self.shape[1]), np.float32)
        if self.of_embedding:
            b = _read_columns(reader, self.a, start, stop).T  # (rows, r)
            a = reader.read_float32(self.b, 0, self.b.n_rows).T  # (r, hidden)
            low_rank_product(np.ascontiguousarray(b), np.ascontiguousarray(a), self.scaling, out)
            return to_float32(_narrowed(out, dtype), dtype)
        b = reader.read_float32(self.b, start, stop)
        low_rank_product(b, reader.read_float32(self.a, 0, self.r), self.scaling, out)
        return out


@dataclass(frozen=True)
class Merge:
    """What an adapter makes of a tensor of the model."""

    origin: Origin
    base: TensorInfo  # the tensor without the adapter
    whole: TensorInfo | None = None  # saved in its place
    low_rank: LowRank | None = None

    @property
    def files(self) -> frozenset[Path]:
        return self.origin.files

    def read_stored(self, reader: TensorReader, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the merged tensor, in the type of `base`. Raises BadInput."""
        from quant.formats.format import Float16Overflow

        dtype = self.base.dtype
        try:
            if self.whole is None:
                rows = reader.read_stored(self.base, start, stop)
            else:
                rows = _narrowed(reader.read_float32(self.whole, start, stop), dtype)
            if self.low_rank is not None:
                w, delta = to_float32(rows, dtype), self.low_rank.delta(reader, start, stop, dtype)
                if count_nonfinite(delta, "F32"):
                    raise Float16Overflow
                with np.errstate(all="ignore"):  # the model's own NaN are for the caller to find
                    w += delta
                rows = _narrowed(w, dtype)
        except Float16Overflow:
            raise BadInput(
                f"{printable(self.base.name)} has weights beyond the range of {dtype} when "
                f"{printable(self.origin.name)} is merged into it.",
                "The training went astray, or the adapter is for another model.",
                f"It was trained on {printable(self.origin.base_model)}.",
            ) from None
        return rows


def _narrowed(w: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded to `dtype`, as stored. Raises Float16Overflow."""
    from quant.formats import FORMATS

    return FORMATS[dtype].encode(w)[""].view(STORED_DTYPES[dtype]).reshape(w.shape)


def _read_columns(reader: TensorReader, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Columns [start, stop) of all rows, float32 (n_rows, stop - start)."""
    dtype = np.dtype(STORED_DTYPES[info.dtype])
    rows = [
        reader.read_bytes(
            info, (row * info.n_columns + start) * dtype.itemsize, (stop - start) * dtype.itemsize
        )
        for row in range(info.n_rows)
    ]
    return to_float32(np.stack(rows).view(dtype), info.dtype)


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter in its weights. Looks for NaN in the adapter, and at headers.

    Raises BadInput for an adapter that does not fit, or is damaged.
    """
    _check_tied(checkpoint, adapter)
    _check_names(checkpoint, adapter)
    low_ranks = dict(_low_ranks(adapter))
    _check_shapes(checkpoint, adapter, low_ranks)
    _check_layers(checkpoint, adapter)
    _check_finite(adapter)
    tensors = dict(checkpoint.tensors)
    for name in adapter.changed:
        base = tensors[name]
        change = Merge(adapter.origin, base, adapter.whole.get(name), low_ranks.get(name))
        tensors[name] = replace(base, change=change)
    return replace(checkpoint, tensors=tensors)


def merge_notes(tensors: dict[str, TensorInfo]) -> Iterator[str]:
    """For the user: which adapter was merged, and into what. Nothing if there is none."""
    merges = [info.change for info in tensors.values() if isinstance(info.change, Merge)]
    for origin in sorted({merge.origin for merge in merges}, key=str):
        low_ranks = [m.low_rank for m in merges if m.origin == origin and m.low_rank]
        n_whole = sum(m.origin == origin and m.whole is not None for m in merges)
        ranks = sorted({low_rank.r for low_rank in low_ranks})
        r = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}"
        replaced = f", {n_whole} tensors replaced" if n_whole else ""
        yield (
            f"merged LoRA {printable(origin.name)}: {r}, {len(low_ranks)} matrices{replaced}; "
            f"it was trained on {printable(origin.base_model)}"
        )


def _low_ranks(adapter: Adapter) -> Iterator[tuple[str, LowRank]]:
    """The model's tensor, and what is added to it. Raises BadInput for a damaged adapter."""
    for module, factors in adapter.factors.items():
        if len(factors) < 2:
            (there,) = factors
            raise _damaged(adapter, f"{module} has an {there}, but not the other factor")
        a, b = factors["A"], factors["B"]
        kinds = {PARTS[_split(info.name)[1]][0] for info in (a, b)}
        r = adapter.config.rank(module)
        of_embedding = module.rpartition(".")[2] == "embed_tokens"
        wanted = {"embedding"} if of_embedding else {"linear"}
        if kinds != wanted or len(a.shape) != 2 or len(b.shape) != 2:
            raise _damaged(adapter, f"{module} has factors that do not belong together")
        if a.shape[0] != r or b.shape[1] != r:
            shapes = f"A is {_times(a.shape)} and B {_times(b.shape)}"
            raise _damaged(adapter, f"{CONFIG} gives {module} the rank {r}, but {shapes}")
        yield f"{module}.weight", LowRank(a, b, adapter.config.scaling(module), of_embedding)


# --- does it fit ------------------------------------------------------------------------------


def _check_names(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Every tensor of the adapter has its place in the model, and a type that can be read."""
    if not adapter.factors:
        raise _damaged(adapter, "it holds no factors A and B")
    for name, info in adapter.tensors.items():
        part = _split(name)[1]
        if (part and part not in PARTS) or not name.startswith(PREFIX):
            raise _damaged(adapter, f"{name} is no part of a plain LoRA")
        if info.dtype not in DTYPES:
            raise _damaged(adapter, f"{name} is stored as {info.dtype}")
    if lost := [name for name in adapter.changed if name not in checkpoint.tensors]:
        raise _misfit(checkpoint, adapter, f"The model has no {_some(lost)}.")
    for info in adapter.whole.values():  # PEFT would pass over these
        module, of_base, _ = info.name.removeprefix(PREFIX).rpartition(".base_layer.")
        module = module if of_base else info.name.removeprefix(PREFIX).rpartition(".")[0]
        if bool(of_base) != (module in adapter.factors):
            raise _damaged(adapter, f"{info.name} is not named as PEFT names it")
    for module in adapter.factors:
        if not adapter.config.is_target(module):
            raise _damaged(adapter, f"{CONFIG} does not aim at {module}, which has a LoRA")


def _check_shapes(checkpoint: Checkpoint, adapter: Adapter, low_ranks: dict[str, LowRank]) -> None:
    """What is added fits the model's tensors, which are in 16 or 32 bits. Raises BadInput."""
    needed = [(name, part.shape) for name, part in (*low_ranks.items(), *adapter.whole.items())]
    stored = {name: checkpoint.tensors[name] for name, _ in needed}
    wrong = [(name, shape) for name, shape in needed if shape != stored[name].shape]
    wrong.sort(key=lambda item: _is_head(item[0]))  # only a vocabulary's size may differ there
    for name, shape in wrong:
        has = stored[name].shape
        if _is_head(name) and has[1:] == shape[1:]:
            raise _other_vocabulary(adapter, name, has, shape)
        reason = f"{printable(name)} is {_times(has)} in the model, and {_times(shape)} where it "
        raise _misfit(checkpoint, adapter, f"{reason}was trained.")
    for name in stored:
        if (dtype := checkpoint.tensors[name].dtype) not in DTYPES:
            raise BadInput(
                f"{printable(name)} is stored as {dtype}, into which no adapter can be merged.",
                "A small change would be lost in the coarse steps of its 8 bits.",
                "Give the 16-bit model that it was made from.",
            )


def _is_head(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in HEADS


def _other_vocabulary(
    adapter: Adapter, name: str, has: tuple[int, ...], needs: tuple[int, ...]
) -> BadInput:
    return BadInput(
        f"{adapter.name} has {needs[0]} tokens, but the model has {has[0]}.",
        f"Its vocabulary was changed: {printable(name)} is {_times(has)} in the model, and "
        f"{_times(needs)} in the adapter.",
        f"Merge it with PEFT after model.resize_token_embeddings({needs[0]}), save the adapter's "
        "tokenizer beside it, and give that folder.",
    )


def _check_tied(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """A change of the embedding would change the output too, or the other way round."""
    if checkpoint.config.get("tie_word_embeddings", False) is not True:
        return
    for name in adapter.changed:
        if _is_head(name):
            raise BadInput(
                f"{adapter.name} changes {printable(name)}, but the model's embedding and output "
                "are one matrix.",
                "In training only one of the two uses was changed; merged, both would be.",
                "Untie them first: load the model with tie_word_embeddings=False, copy the "
                "embedding to lm_head, save it, and give that folder.",
            )


def _check_layers(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """The adapter has something for every layer that it aims at.

    Qwen2.5-14B's attention has the shapes of Qwen2.5-32B's, but 48 layers of it, not 64.
    """
    kinds = {_without_layer(module) for module in adapter.factors}
    missing = [
        module
        for module in (name.removesuffix(".weight") for name in checkpoint.tensors)
        if module not in adapter.factors
        and _without_layer(module) in kinds
        and adapter.config.is_target(module)
    ]
    if missing:
        raise _misfit(
            checkpoint, adapter, f"It has nothing for {_some(missing)}, at which {CONFIG} aims."
        )


def _without_layer(module: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.N.", module, count=1)


def _check_finite(adapter: Adapter) -> None:
    """Diverged trainings are published too. Raises BadInput."""
    with TensorReader() as reader:
        for name, info in adapter.tensors.items():
            step = max(1, ROWS_AT_ONCE // max(1, info.n_columns))
            for start in range(0, info.n_rows, step):
                rows = reader.read_stored(info, start, min(start + step, info.n_rows))
                if n_bad := count_nonfinite(rows, info.dtype):
                    raise BadInput(
                        f"{adapter.name} holds {n_bad} NaN or infinite weights in "
                        f"{printable(name)}.",
                        "Merged, they would spoil a whole row or column of the model's matrix.",
                        "Download it again, or ask its maker.",
                    )


def _misfit(checkpoint: Checkpoint, adapter: Adapter, reason: str) -> BadInput:
    return BadInput(
        f"{adapter.name} is an adapter for another model than {printable(checkpoint.name)}.",
        reason,
        f"Give the model that it was trained on: {printable(adapter.origin.base_model)}.",
    )


def _damaged(adapter: Adapter, reason: str) -> BadInput:
    return BadInput(
        f"{adapter.name} cannot be merged: {printable(reason)}.",
        f"{CONFIG} and {WEIGHTS} do not go together, or were made by something else than PEFT.",
        "Fetch both again, or merge it with PEFT (merge_and_unload) and give that folder.",
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - N_SHOWN} more" if len(names) > N_SHOWN else ""
    return ", ".join(printable(name) for name in names[:N_SHOWN]) + more
