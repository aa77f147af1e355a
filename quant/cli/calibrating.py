"""What the commands that run a model on a calibration text share."""

from pathlib import Path


def calibration_tokens(checkpoint, calibration: Path | None, n_tokens: int, seq_len: int):
    """Tokens of the text that --calibration names, or of the built-in one. Raises BadInput."""
    from quant.calibration.tokens import cut_tokens
    from quant.texts import built_in_texts, read_texts

    texts = built_in_texts() if calibration is None else read_texts(calibration)
    return cut_tokens(checkpoint, texts, n_tokens, seq_len)
