"""What turns text into token ids: a model's vocabulary, from Hugging Face's files to GGUF's keys.

A wrong vocabulary is the quietest of faults: the file loads, the model answers, and every answer is
a little worse. So each part of it has a room here, and each is held to the real llama.cpp by tests.
"""

from quant.vocabulary.vocabulary import Vocabulary, read_vocabulary

__all__ = ["Vocabulary", "read_vocabulary"]
