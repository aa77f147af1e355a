"""What the commands that run a model on a text share."""

from pathlib import Path

CHECKED_TOKENS, CHECKED_SEQ_LEN = 8192, 256
"""Of held-out text: half of them are scored."""


def calibration_tokens(checkpoint, calibration: Path | None, n_tokens: int, seq_len: int):
    """Tokens of the text that --calibration names, or of the built-in one. Raises BadInput."""
    from quant.calibration.tokens import cut_tokens
    from quant.texts import built_in_texts, read_texts

    texts = built_in_texts() if calibration is None else read_texts(calibration)
    return cut_tokens(checkpoint, texts, n_tokens, seq_len)


def held_out_tokens(checkpoint):
    """Tokens of the built-in text that written models are checked on.

    The same whatever the model was calibrated on, so that results can be compared.
    """
    from quant.calibration.tokens import context_length, cut_tokens
    from quant.texts import held_out_texts

    seq_len = min(CHECKED_SEQ_LEN, context_length(checkpoint))
    return cut_tokens(checkpoint, held_out_texts(), CHECKED_TOKENS, seq_len)
