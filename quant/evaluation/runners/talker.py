"""What a folder's tokenizer and chat template can do without the weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quant.calibration.tokens import read_tokenizer
from quant.evaluation.prompts import render_prompts


class Talker:
    """Half of a Runner: text to tokens and back, and messages to prompts."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self._tokenizer = read_tokenizer(folder)
        start = self._tokenizer("a").input_ids[:1]
        self.bos = start[0] if start == [self._tokenizer.bos_token_id] else None

    def tokenize(self, text: str, special: bool) -> np.ndarray:
        # verbose: it warns of texts longer than the model's context
        found = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not special, verbose=False
        )
        return np.asarray(found.input_ids, np.int32)

    def prompts(self, messages: Sequence[str]) -> list[str]:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        return render_prompts(self.name, template, self._tokenizer.special_tokens_map, messages)

    def text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
