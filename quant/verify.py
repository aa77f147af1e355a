"""Is an output still what was written, is it well made, and does it run?

    files       every file that the manifest names, by size and sha256; a damaged one by tensors
    structure   the container itself: headers, places, shards, split parts
    meaning     what readers would take wrongly: the list of 16-bit modules, the doctor's errors
    run         the engine that people use loads it and predicts a token

Each check is made even if one before it failed, so that the report tells a damaged download from a
file that was never right.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant import manifest
from quant.checkpoint import CONFIG, read_tensors
from quant.display import human_bytes, printable
from quant.durable import foreign_files
from quant.errors import BadInput, CannotCreate, InputMissing, QwqQuantError, Unavailable
from quant.gguf_file import MAGIC, GgufFile, Value, open_gguf
from quant.safetensors_file import read_header
from quant.sinks.written import READ_BACK_NBYTES, hash_file
from quant.strict_files import open_regular, parse_json

OK, FAILED, NOT_MADE = "ok", "failed", "not made"

MOST_CONFIG_NBYTES = 16 << 20
IMPORTANCE = Value("str", "imatrix")  # general.type
N_NAMED = 3  # tensors or files in one line of evidence
TEXT = "The capital of France is"

Progress = Callable[[int], None]
"""Called with the number of bytes that were just hashed."""


@dataclass(frozen=True)
class Outcome:
    """One check of one output. The evidence may hold names from files: untrusted."""

    check: str
    state: str  # OK, FAILED or NOT_MADE
    evidence: str


@dataclass(frozen=True)
class Output:
    """Something that was written: a GGUF file (the first of a split one) or a model's folder."""

    path: Path
    entry: dict | None  # what the manifest says of it; None: nothing

    @property
    def folder(self) -> Path:
        """Where the files of the entry lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        return sum(_whole_number(file.get("nbytes")) for file in _files(self.entry or {}))


def find_outputs(path: Path) -> list[Output]:
    """What `path` is: one output, or the folder of several that its manifest names.

    Raises InputMissing, or BadInput for a manifest that is none, and for a file that nothing names
    and that looks like no GGUF file.
    """
    if not path.exists():
        raise InputMissing(f"There is no {printable(path)}.")
    folder = path if path.is_dir() else path.parent
    entries = _entries(folder)
    if path.is_dir():
        if "." in entries or not entries:
            return [Output(path, entries.get("."))]
        return [Output(folder / name, entry) for name, entry in sorted(entries.items())]
    for name, entry in entries.items():
        if path.name == name or path.name in {file.get("name") for file in _files(entry)}:
            return [Output(folder / name, entry)]
    if path.suffix != ".gguf" and not _begins_as_gguf(path):
        raise BadInput(
            f"{printable(path)} is nothing that can be verified.",
            "It is no GGUF file, and no qwq-quant.json names it.",
            "Name a .gguf file or the folder of a model.",
        )
    return [Output(path, None)]


def _begins_as_gguf(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def verify(output: Output, progress: Progress = lambda nbytes: None) -> list[Outcome]:
    """All checks of an output, in the order of this room's description."""
    return [
        _outcome("files", lambda: _check_files(output, progress)),
        _outcome("structure", lambda: _check_structure(output.path)),
        _outcome("meaning", lambda: _check_meaning(output.path)),
        _outcome("run", lambda: _check_run(output.path)),
    ]


def _outcome(check: str, look: Callable[[], str]) -> Outcome:
    """look: returns the evidence; BadInput and its like say why it failed."""
    try:
        return Outcome(check, OK, look())
    except (_NotMade, Unavailable) as error:
        return Outcome(check, NOT_MADE, str(error).replace("\n", " "))
    except QwqQuantError as error:
        return Outcome(check, FAILED, str(error).replace("\n", " "))


class _NotMade(Exception):
    """Why a check does not apply."""


# --- the manifest -------------------------------------------------------------------------------


def _entries(folder: Path) -> dict[str, dict]:
    """The manifest's entries. Raises BadInput if it is damaged, or names files elsewhere."""
    try:
        outputs = manifest.read_manifest(folder)["outputs"]
    except CannotCreate as error:  # in the words of one who would write it
        raise BadInput(error.what, "So nothing tells what was written.", "") from error
    for name, entry in outputs.items():
        names = [name, *(file.get("name") for file in _files(entry))]
        if not all(isinstance(n, str) and (n == "." or _is_inside(n)) for n in names):
            raise BadInput(
                f"{printable(folder / manifest.NAME)} names a file outside its folder.",
                "It was not written by this program, or was changed.",
            )
    return outputs


def _files(entry: object) -> list[dict]:
    files = entry.get("files") if isinstance(entry, dict) else None
    return [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []


def _is_inside(name: str) -> bool:
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def _whole_number(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0


# --- files --------------------------------------------------------------------------------------


def _check_files(output: Output, progress: Progress) -> str:
    """Raises BadInput that names what differs."""
    files = _files(output.entry or {})
    if not files:
        raise _NotMade(f"No {manifest.NAME} names it.")
    tensors = output.entry.get("tensors")
    tensors = tensors if isinstance(tensors, dict) else {}
    bad = []
    for file in files:
        bad += _differences(output.folder, file, tensors)
        progress(_whole_number(file.get("nbytes")))
    if bad:
        more = f" And {len(bad) - N_NAMED} more." if len(bad) > N_NAMED else ""
        raise BadInput(" ".join(bad[:N_NAMED]) + more)
    n = f"{len(files)} files" if len(files) > 1 else "1 file"
    return f"{n}, {human_bytes(output.nbytes)}, as {_written(output)}{_others(output)}"


def _written(output: Output) -> str:
    version, time = (printable(output.entry.get(key), 40) for key in ("qwq_quant", "time"))
    return f"written by qwq-quant {version} on {time.partition('T')[0]}"


def _others(output: Output) -> str:
    if output.path.is_file() or not (others := foreign_files(output.path)):
        return ""
    return f"; besides them: {_some(others)}"


def _differences(folder: Path, file: dict, tensors: dict) -> Iterator[str]:
    """What is wrong with one file of the manifest; tensors: what it says about those."""
    name, path = printable(file["name"]), folder / file["name"]
    if not path.is_file():
        yield f"{name} is missing."
        return
    nbytes = path.stat().st_size
    if nbytes != file.get("nbytes"):
        yield f"{name} has {nbytes} bytes, not {printable(file.get('nbytes'), 20)}."
        return
    if _sha256(path) != file.get("sha256"):
        yield f"{name} was changed{_which_tensors(path, tensors)}."


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BACK_NBYTES):
            whole.update(block)
    return whole.hexdigest()


def _which_tensors(path: Path, tensors: dict) -> str:
    """ ", in blk.3.ffn_down.weight", or nothing if that cannot be told."""
    try:
        if path.suffix == ".gguf":
            infos = GgufFile.open(path).tensors
        elif path.suffix == ".safetensors":
            infos = read_header(path)[0]
        else:
            return ""
    except QwqQuantError:
        return ": its header cannot be read any more"
    hashes, _ = hash_file(path, sorted(infos.values(), key=lambda info: info.offset))
    said = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, dict)}
    bad = [name for name, found in hashes.items() if said.get(name, {}).get("xxh3_128") != found]
    return f", in {_some(bad)}" if bad else ", outside its tensors"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return ", ".join(printable(name) for name in names[:N_NAMED]) + more


# --- structure and meaning ----------------------------------------------------------------------


def _check_structure(path: Path) -> str:
    """Headers, places, shards. Raises BadInput or InputMissing."""
    if path.is_dir():
        return f"{len(read_tensors(path))} tensors, {len(_config(path))} settings in {CONFIG}"
    gguf = open_gguf(path)
    return f"{len(gguf.tensors)} tensors, {len(gguf.metadata)} keys"


def _check_meaning(path: Path) -> str:
    """What opens and is nevertheless wrong. Raises BadInput."""
    if path.is_dir() and (method := _quantization(path)) is not None:
        return _check_quantized(path, method)
    if _is_importance_matrix(path):
        from quant.importance import read_importance

        return f"an importance matrix of {len(read_importance(path).values)} weights"
    from quant.doctor.checks import examine
    from quant.recipe import choose_recipe
    from quant.source import open_source

    source = open_source(str(path.absolute()), offline=True)
    report = examine(source, choose_recipe(source))
    if errors := report.of("error"):
        found = " ".join(f"{e.id}: {printable(e.seen.what)}" for e in errors[:N_NAMED])
        raise BadInput(found, "", f"qwq-quant doctor {printable(path)}")
    return f"{len(report.checked)} of the doctor's checks, no error"


def _is_importance_matrix(path: Path) -> bool:
    """Whether it is what `qwq-quant imatrix` or llama-imatrix writes: GGUF, but no model."""
    return path.is_file() and open_gguf(path).metadata.get("general.type") == IMPORTANCE


def _config(folder: Path) -> dict:
    with open_regular(folder / CONFIG) as file:
        return parse_json(file.read(MOST_CONFIG_NBYTES), folder / CONFIG)


def _quantization(folder: Path) -> str | None:
    stated = _config(folder).get("quantization_config")
    return printable(stated.get("quant_method")) if isinstance(stated, dict) else None


def _check_quantized(folder: Path, method: str) -> str:
    """Whether the weights are those that config.json speaks of. Raises BadInput."""
    from quant.calibration.bnb_weights import Bnb4bitWeights
    from quant.groups import find_linears
    from quant.skip_list import check_skip_list

    if method == "gptq":
        return _check_gptq(folder)
    if method != "bitsandbytes":
        raise _NotMade(f"There is no check of {method}'s settings.")
    weights = Bnb4bitWeights(folder)
    linears = find_linears((name, weights.shape(name)) for name in weights.names)
    kept = [name for name in linears if not weights.is_4bit(f"{name}.weight")]
    stated = _config(folder)["quantization_config"]
    entries = stated.get("llm_int8_skip_modules")
    if not (isinstance(entries, list) and all(isinstance(e, str) for e in entries)):
        raise BadInput("config.json lists no modules that stay 16-bit (llm_int8_skip_modules).")
    check_skip_list(entries, linears, kept)
    return f"{len(linears) - len(kept)} linears 4-bit, {len(kept)} 16-bit: all readers agree"


def _check_gptq(folder: Path) -> str:
    """Whether every reader gives each layer the bits that it is stored in. Raises BadInput."""
    from quant.calibration.gptq_weights import GptqWeights
    from quant.dynamic_rules import check_rules, stored_bits
    from quant.groups import find_groups

    weights, config = GptqWeights(folder), _config(folder)["quantization_config"]
    groups = find_groups((name, weights.shape(name)) for name in weights.names)
    stored = stored_bits(read_tensors(folder), groups)
    check_rules(config, groups, stored)
    counts = sorted(Counter(stored.values()).items())
    return ", ".join(f"{n} linears in {bits} bits" for bits, n in counts) + ": all readers agree"


# --- run ----------------------------------------------------------------------------------------


def _check_run(path: Path) -> str:
    """Load it in a process of its own and predict one token. Raises BadInput or Unavailable."""
    if _is_importance_matrix(path):
        raise _NotMade("There is nothing to run in an importance matrix.")
    from quant.evaluation.isolation import run_isolated

    found = run_isolated(predict_one_token, (str(path),), lambda *message: None)
    return f"{found['engine']} continues {TEXT!r} with {printable(found['token'])!r}"


def predict_one_token(path: str, say: Callable) -> dict:
    """Work for that process: the likeliest token after TEXT. Raises BadInput."""
    from quant.evaluation.runners import open_runner

    with open_runner(Path(path)) as runner:
        tokens = runner.tokenize(TEXT, special=False)
        if runner.bos is not None:
            tokens = np.concatenate([np.array([runner.bos], tokens.dtype), tokens])
        # One window instead of an answer: a model that does not fit in memory can do that, too. The
        # token at its end is not read; what is predicted before it is wanted.
        window = np.concatenate([tokens, tokens[:1]])[None]
        logits = next(iter(runner.logits(window, len(tokens) - 1)))[0]
        if not np.isfinite(logits).all():
            raise BadInput("It runs, but its logits are not finite.")
        token = runner.text([int(logits.argmax())])
    return {"engine": "llama.cpp" if path.endswith(".gguf") else "transformers", "token": token}
