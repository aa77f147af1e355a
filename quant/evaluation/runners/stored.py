"""A model folder's weights as numbers, however they are stored, and the memory they would take."""

from math import prod
from pathlib import Path

from quant.calibration.bnb_weights import Bnb4bitWeights
from quant.calibration.gptq_weights import GptqWeights
from quant.calibration.weights import CheckpointWeights
from quant.checkpoint import CONFIG, Checkpoint, read_tensors

FLOATING = ("F64", "F32", "F16", "BF16")

StoredWeights = CheckpointWeights | GptqWeights | Bnb4bitWeights


def find_weights(folder: Path) -> StoredWeights | None:
    """What reads them: 16-bit, FP8, GPTQ, 4-bit bitsandbytes; None if only their library can.

    Raises BadInput or InputMissing for a folder that is damaged or incomplete.
    """
    method = quantization(folder)
    if method.get("quant_method") == "gptq":
        return GptqWeights(folder)
    if method.get("load_in_4bit") is True and method.get("bnb_4bit_quant_storage") in (
        None,
        "uint8",
    ):
        return Bnb4bitWeights(folder)
    if method and method.get("quant_method") != "fp8":
        return None
    return CheckpointWeights(Checkpoint.open(folder))


def quantization(folder: Path) -> dict:
    """What config.json says of it; {} for a 16-bit model."""
    config = Checkpoint(folder, folder.name, None, {}, {}).read_json(CONFIG) or {}
    said = config.get("quantization_config")
    return said if isinstance(said, dict) else {}


def count_weights(weights: StoredWeights) -> int:
    """How many numbers they are."""
    return sum(prod(weights.shape(name) or ()) for name in weights.names)


def loaded_nbytes(folder: Path, weights: StoredWeights | None, width: int) -> int:
    """Of the model in memory as FolderRunner has it. width: bytes of a floating weight there.

    bitsandbytes' 4-bit weights stay packed; GPTQ's are decoded.
    """
    if isinstance(weights, (CheckpointWeights, GptqWeights)):
        return width * count_weights(weights)
    stored = read_tensors(folder).values()
    return sum(width * t.n_weights if t.dtype in FLOATING else t.nbytes for t in stored)
