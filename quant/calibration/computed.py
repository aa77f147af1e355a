"""A file that a model is run over a text for, by as many runs as it takes; written whole."""

from collections.abc import Callable
from pathlib import Path

import torch
from xxhash import xxh3_128

from quant.calibration.passes import Passes
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.durable import PendingFile
from quant.fingerprint import fingerprint
from quant.journal import Journal, Resume
from quant.manifest import SourceFile, package_versions
from quant.source import check_unchanged, source_files

CODE = (
    "calibration", "formats", "measuring", "architectures.py", "evaluation/streamed.py",
    "groups.py", "imatrix.py", "importance.py", "kv_cache/calibrate.py", "kv_cache/scales.py",
    "lora.py", "sensitivity.py", "tensors.py",
)  # fmt: skip
"""What makes numbers of weights and tokens."""


def write_computed(
    output: Path,
    decides: dict,
    resume: Resume,
    model: StreamedModel,
    n_steps: int,
    compute: Callable[[Passes], tuple[bytes, str]],
    check: Callable[[], None],
) -> str:
    """Write what `compute` gives; what it says of it, for the user.

    decides: the fingerprint, see what_decides. n_steps: of its passes. check: raises what must not
    be written over; not asked for an output that this very job has written.
    Raises OutputFailed, CannotCreate, BadInput if the source changed, or Stopped.
    """
    source = model.checkpoint
    before = [SourceFile.of(path) for path in source_files(source)]
    with Journal(output, decides, resume, "steps", n_steps) as journal:
        passes = journal.hold(Passes(journal))
        if journal.completed is not None and _holds(output, journal.completed["xxh3"]):
            journal.begin(len(journal.units))
            return journal.completed["said"]
        check()
        journal.begin(passes.take_up(len(journal.units)))
        data, said = compute(passes)
        check_unchanged(source, before)
        pending = journal.hold(PendingFile(output))
        pending.write_at(0, data)
        pending.flush()
        journal.complete({"xxh3": xxh3_128(data).hexdigest(), "said": said})
        pending.publish()
        return said


def _holds(path: Path, xxh3: str) -> bool:
    """Whether the file is there with that content."""
    return path.is_file() and xxh3_128(path.read_bytes()).hexdigest() == xxh3


def what_decides(model: StreamedModel, tokens: Tokens | None, **facts: object) -> dict:
    """The fingerprint of what is computed from a model on a text. tokens: None without any."""
    checkpoint = model.checkpoint
    hashed = {"config.json": checkpoint.config, "tensors": checkpoint.tensors}
    if tokens is not None:
        facts |= {"calibration text": tokens.text_name, "tokens": tokens.n_tokens}
        facts |= {"tokens in a sequence": tokens.seq_len}
        hashed |= {"calibration tokens": tokens.ids, "sha256 of the text": tokens.text_sha256}
    facts |= {"model": checkpoint.public_name, "revision": checkpoint.revision}
    facts |= {"device": device_name(model.device), "computed in": str(model.dtype)}
    return fingerprint(code=CODE, hashed=hashed, **facts, **package_versions())


def device_name(device: torch.device) -> str:
    """With what decides in which order numbers are added up."""
    if device.type == "cuda":
        return f"{device.type}, {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        kind = torch.backends.cpu.get_cpu_capability()
        return f"cpu, {kind}, {torch.get_num_threads()} threads"
    return device.type
