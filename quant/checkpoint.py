"""A model folder in Hugging Face's layout: its config, its tensors' places, its other files.

Everything in the folder is untrusted text that someone published. A shard's name from the index is
checked before anything is opened, and no name or link leads out of the folder; only the hub cache,
whose files are links into `blobs` beside the snapshot, may do that (transformers 5.23 follows
`../` in an index: huggingface/transformers#47176).
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath

from quant.display import human_bytes, printable
from quant.errors import BadInput, InputMissing
from quant.hub import download_command, snapshot_root
from quant.safetensors_file import read_header
from quant.strict_files import explain_os_error, open_regular, parse_json
from quant.tensors import TensorInfo, fp8_block

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

MAX_NBYTES = {CONFIG: 10_000_000, INDEX: 100_000_000}
MAX_OTHER_NBYTES = 200_000_000
"""Far above any honest config, index or tokenizer; a bigger one would only fill the memory."""

N_SHOWN = 10  # names in a message

OTHER_FORMATS = [
    (
        "*.gguf",
        "It holds a model in GGUF, the format of llama.cpp.",
        "Give the .gguf file itself as the model.",
    ),
    (
        "adapter_model.safetensors",
        "It holds a LoRA adapter, not a model.",
        "Give the model that it was trained on, and this folder with --lora.",
    ),
    (
        "consolidated*.safetensors",
        "It holds the weights under their maker's own names.",
        "Fetch the layout of Hugging Face: hf download ORG/NAME --include 'model*.safetensors*'",
    ),
    (
        "pytorch_model*.bin",
        "It holds Python pickles, which can run code when they are opened.",
        'Convert once: python -c "from transformers import AutoModelForCausalLM as M;'
        " M.from_pretrained('FOLDER').save_pretrained('NEW')\"",
    ),
]
"""Weights that we do not read: file names, what they are, what to do."""

SCALE_DTYPES = ("F32", "BF16", "F16")
SCALE_SUFFIX = "_scale_inv"
ACTIVATION_SCALES = ("activation_scale", "input_scale")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened and checked; headers were read, no weights.

    folder: where config.json lies; name: what the user typed, for messages and metadata;
    revision: the commit on the hub, or None for a local folder;
    tensors: by Hugging Face's names; an FP8 weight carries its scale, which is not listed itself.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(
        cls, folder: Path, name: str | None = None, revision: str | None = None
    ) -> "Checkpoint":
        """Read config.json and every shard's header; validate all of it.

        Raises InputMissing, NotPermitted or BadInput with the file, the reason and the next step.
        """
        folder = Path(folder)
        config = read_config(folder)
        stored = read_tensors(folder)
        if any(name.endswith(".qweight") for name in stored):
            raise _already_quantized(folder, "packed integers, as GPTQ or AWQ write them")
        tensors = _with_scales(folder, stored, _stated_block(folder, config))
        return cls(folder, str(folder) if name is None else name, revision, config, tensors)

    @property
    def public_name(self) -> str:
        """Of a local model not its path: what is published must not tell of the user's folders."""
        return self.name if self.revision else self.folder.resolve().name

    def read_json(self, file_name: str) -> dict | None:
        """A JSON object file of the folder, or None if there is none. Raises BadInput."""
        raw = self.read_bytes(file_name)
        return None if raw is None else parse_json(raw, self.folder / file_name)

    def read_text(self, file_name: str) -> str | None:
        """A UTF-8 text file of the folder, or None if there is none. Raises BadInput."""
        raw = self.read_bytes(file_name)
        try:
            return None if raw is None else raw.decode()
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{printable(self.folder / file_name)} is no UTF-8 text.",
                f"Byte {error.start} of it is not.",
            ) from None

    def read_bytes(self, file_name: str) -> bytes | None:
        """A small file of the folder as it is, or None if there is none. Raises BadInput."""
        return _read_small(self.folder, file_name)


def read_config(folder: Path) -> dict:
    """config.json of a checkpoint that is not quantized yet.

    Raises BadInput, or InputMissing; without the file, the error says what the folder may be.
    """
    try:
        present = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise InputMissing(
            f"There is no folder {printable(folder)}.",
            next_step="Check the path, or write org/name for a model on the hub.",
        ) from None
    except NotADirectoryError:
        raise BadInput(
            f"{printable(folder)} is not a folder.",
            next_step="Give the folder that holds config.json.",
        ) from None
    except OSError as error:
        raise explain_os_error(folder, error) from error
    raw = _read_small(folder, CONFIG)
    if raw is None:
        known = _other_format(folder, present)
        raise known or InputMissing(
            f"{printable(folder)} holds no {CONFIG}, so it is no checkpoint.",
            _listing(present),
            "Give the folder that holds config.json and model*.safetensors.",
        )
    config = parse_json(raw, folder / CONFIG)
    _refuse_quantized(folder, config)
    return config


def _listing(present: list[str]) -> str:
    return f"It holds: {_some(present)}." if present else "It is empty."


def _some(names: Iterable[str]) -> str:
    """The first few names, safe to print, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - N_SHOWN} more" if len(names) > N_SHOWN else ""
    return ", ".join(printable(name) for name in names[:N_SHOWN]) + more


def _refuse_quantized(folder: Path, config: dict) -> None:
    """Raise BadInput if the config says that the weights were quantized, except to FP8 E4M3."""
    found = {}
    for key in ("quantization_config", "compression_config", "quantization"):
        found = found or config.get(key) or {}
    if not found:
        return
    if not isinstance(found, dict):
        raise BadInput(f"{printable(folder / CONFIG)}: the quantization_config is no object.")
    method = found.get("quant_method")
    if method == "fp8" and found.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"):
        return
    if method is None and any(key.startswith(("load_in_", "bnb_")) for key in found):
        method = "bitsandbytes"
    if method is None:
        method = "MLX" if "quantization" in config else "unnamed"
    raise _already_quantized(folder, f"{method} {found.get('fmt', '')}".strip())


def _already_quantized(folder: Path, method: str) -> BadInput:
    return BadInput(
        f"{printable(folder)} is already quantized (method: {printable(method)}).",
        "Quantizing it a second time would lose more than once.",
        "Convert the 16-bit model that it was made from; its model card names it.",
    )


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of model.safetensors or, if there is none, of the index's shards.

    The order is transformers': a single file goes before an index (modeling_utils.py,
    _get_resolved_checkpoint_files).
    """
    if (path := _inside(folder, SINGLE)) is not None:
        tensors, _ = read_header(path)
    elif (raw := _read_small(folder, INDEX)) is not None:
        tensors = _read_shards(folder, _weight_map(folder / INDEX, raw))
    else:
        present = sorted(os.listdir(folder))
        raise _other_format(folder, present) or _no_weights(folder, present)
    return tensors


def _no_weights(folder: Path, present: list[str]) -> InputMissing:
    if any(fnmatch(name, "*.safetensors") for name in present):
        return InputMissing(
            f"{printable(folder)} holds .safetensors files, but neither {SINGLE} nor {INDEX}.",
            "Without the index it is not known whether all of them are there.",
            f"Fetch it: {download_command(folder / INDEX)}",
        )
    return InputMissing(
        f"{printable(folder)} holds no weights.",
        _listing(present),
        f"Fetch them: {download_command(folder / SINGLE)}",
    )


def _other_format(folder: Path, present: list[str]) -> BadInput | None:
    """The error for weights in a format that we do not read, or None."""
    for pattern, what, next_step in OTHER_FORMATS:
        if found := [name for name in present if fnmatch(name, pattern)]:
            return BadInput(
                f"{printable(folder)} holds no weights that can be converted.",
                f"{what} ({_some(found)})",
                next_step,
            )
    return None


def _weight_map(path: Path, raw: bytes) -> dict[str, str]:
    """The index as tensor -> shard; every shard's name is checked and in its simplest spelling."""
    weight_map = parse_json(raw, path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise BadInput(f"{printable(path)} has no weight_map of tensor names to shard names.")
    if not weight_map:
        raise BadInput(f"{printable(path)} names no tensors.")
    simplest = {}
    for shard in sorted(set(weight_map.values())):
        _check_shard_name(path, shard)
        simplest[shard] = str(PurePosixPath(shard))
    return {name: simplest[shard] for name, shard in weight_map.items()}


def _check_shard_name(path: Path, shard: str) -> None:
    """A shard is named by a plain relative path to a .safetensors file, on any system."""
    windows = PureWindowsPath(shard)  # takes / and \ for separators, and knows drives
    if windows.drive or windows.root or ".." in windows.parts:
        reason = "It would lead out of the model's folder."
    elif "\\" in shard or not shard.isprintable():
        reason = "It has a backslash, or a character that cannot be printed."
    elif not shard.endswith(".safetensors"):
        reason = "Only .safetensors files are read: others could run code."
    else:
        return
    raise BadInput(f"{printable(path)} names the shard {printable(shard)!r}.", reason)


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all shards, which must hold what the index says and nothing else."""
    n_tensors = Counter(weight_map.values())
    paths = {shard: _inside(folder, shard) for shard in sorted(n_tensors)}
    if missing := [shard for shard, path in paths.items() if path is None]:
        raise InputMissing(
            f"{len(missing)} of {len(paths)} shards are missing from {printable(folder)}.",
            _some(f"{shard} ({n_tensors[shard]} tensors)" for shard in missing),
            f"Fetch them: {download_command(folder / missing[0])}",
        )
    held = {shard: read_header(path)[0] for shard, path in paths.items()}
    _check_index(folder, weight_map, held)
    return {name: held[shard][name] for name, shard in weight_map.items()}


def _check_index(
    folder: Path, weight_map: dict[str, str], held: dict[str, dict[str, TensorInfo]]
) -> None:
    """Compare the index with what the shards hold, both ways. Raises BadInput with both lists."""
    homes: dict[str, list[str]] = {}
    for shard, tensors in held.items():
        for name in tensors:
            homes.setdefault(name, []).append(shard)
    differences = {
        "in the index but in no shard": [name for name in weight_map if name not in homes],
        "in a shard but not in the index": [name for name in homes if name not in weight_map],
        "in another shard than the index says": [
            f"{name} (in {homes[name][0]}, not {shard})"
            for name, shard in weight_map.items()
            if name in homes and shard not in homes[name]
        ],
        "in more than one shard": [
            f"{name} (in {', '.join(shards)})" for name, shards in homes.items() if len(shards) > 1
        ],
    }
    found = [
        f"{len(names)} {where}: {_some(names)}" for where, names in differences.items() if names
    ]
    if found:
        raise BadInput(
            f"The index and the shards of {printable(folder)} do not fit together.",
            "\n".join(f"Tensors {line}." for line in found),
            f"They may be of two versions; fetch all again: {download_command(folder / INDEX)}",
        )


def _stated_block(folder: Path, config: dict) -> tuple[int, int] | None:
    """weight_block_size of an FP8 checkpoint: rows and columns that one scale covers."""
    stated = (config.get("quantization_config") or {}).get("weight_block_size")
    if stated is None:
        return None
    if not (isinstance(stated, list) and len(stated) == 2) or not all(
        type(n) is int and n > 0 for n in stated
    ):
        raise BadInput(
            f"{printable(folder / CONFIG)}: weight_block_size is {printable(stated, 60)}.",
            "Two whole numbers are needed, such as [128, 128].",
        )
    return stated[0], stated[1]


def _with_scales(
    folder: Path, tensors: dict[str, TensorInfo], stated: tuple[int, int] | None
) -> dict[str, TensorInfo]:
    """FP8 weights with their scales attached; scales of weights and activations no longer listed.

    DeepSeek and Qwen3-FP8 store w / scale in F8_E4M3 beside `<name>_scale_inv`. The scale of the
    activations belongs to the kernel that ran the model, not to the weights.
    """
    result = {}
    for name, info in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or weight.dtype != "F8_E4M3":
                stored = "missing" if weight is None else f"stored as {weight.dtype}"
                raise _bad_scale(folder, info, f"but its weight, which should be FP8, is {stored}")
        elif info.dtype == "F8_E4M3":
            scale, block = _scale_of(folder, info, tensors, stated)
            result[name] = replace(info, scale=scale, scale_block=block)
        elif not _is_activation_scale(name, tensors):
            result[name] = info
    return result


def _scale_of(
    folder: Path,
    weight: TensorInfo,
    tensors: dict[str, TensorInfo],
    stated: tuple[int, int] | None,
) -> tuple[TensorInfo, tuple[int, int] | None]:
    """The scale stored beside an FP8 weight, and the block of it that one value covers.

    Raises BadInput if it cannot be applied.
    """
    scale = tensors.get(weight.name + SCALE_SUFFIX)
    if scale is None:
        raise BadInput(
            f"{printable(folder)} stores {printable(weight.name)} in FP8 without a scale.",
            f"There is no {printable(weight.name + SCALE_SUFFIX)}, so its size is not known.",
            "Convert the 16-bit model that it was made from.",
        )
    if scale.dtype not in SCALE_DTYPES:
        raise _bad_scale(folder, scale, f"but only {', '.join(SCALE_DTYPES)} are read")
    if scale.n_weights == 1:
        return scale, None
    try:
        return scale, fp8_block(weight.shape, scale.shape, stated)
    except ValueError as error:
        reason = f"but its weight has the shape {list(weight.shape)}: {error}"
        raise _bad_scale(folder, scale, reason) from None


def _bad_scale(folder: Path, scale: TensorInfo, reason: str) -> BadInput:
    return BadInput(
        f"{printable(folder)} has an FP8 scale that cannot be applied: {printable(scale.name)}.",
        f"It is stored as {scale.dtype} {list(scale.shape)}, {reason}.",
        "Convert the 16-bit model that it was made from.",
    )


def _is_activation_scale(name: str, tensors: dict[str, TensorInfo]) -> bool:
    module, _, last = name.rpartition(".")
    weight = tensors.get(f"{module}.weight")
    return last in ACTIVATION_SCALES and weight is not None and weight.dtype == "F8_E4M3"


def _read_small(folder: Path, file_name: str) -> bytes | None:
    """The bytes of a file that is no shard, or None if there is none. BadInput if too big."""
    if (path := _inside(folder, file_name)) is None:
        return None
    limit = MAX_NBYTES.get(file_name, MAX_OTHER_NBYTES)
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise BadInput(f"{printable(path)} is larger than {human_bytes(limit)}, so it is not read.")
    return raw


def _inside(folder: Path, file_name: str) -> Path | None:
    """folder / file_name if it is there and leads nowhere outside; None if it is not there.

    A link may leave the folder in one case: from a snapshot of the hub's cache to the `blobs` of
    the same repository. Raises BadInput, or InputMissing for a link to nothing.
    """
    path = folder / file_name
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise explain_os_error(path, error) from error
    try:
        root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise explain_os_error(path, error) from error
    allowed = [root]
    if snapshot := snapshot_root(root):
        allowed.append(snapshot.parents[1] / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise BadInput(
            f"{printable(path)} is a link out of the model's folder.",
            f"It leads to {printable(target)}; a published model has no business there.",
            "If you made the link, replace it by the file itself.",
        )
    return path
