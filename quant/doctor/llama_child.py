"""Token ids of some texts from llama.cpp and from transformers, in a process of their own.

Run by quant.doctor.llama, never imported: one JSON request on stdin, one JSON answer on stdout.
"""

import ctypes
import json
import os
import sys

import llama_cpp

SAID: list[str] = []


@llama_cpp.llama_log_callback
def listen(level, text, user_data):
    SAID.append(text.decode("utf-8", "replace"))


def llama_ids(path: str, texts: list[str]) -> dict:
    """{"llama": ids of each text}, or {"problem": llama.cpp's last words}."""
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return {"problem": " ".join("".join(SAID[-3:]).split())[-300:] or "it gave no reason"}
    vocab = llama_cpp.llama_model_get_vocab(model)
    return {"problem": "", "llama": [_tokenize(vocab, text.encode()) for text in texts]}


def _tokenize(vocab, raw: bytes) -> list[int]:
    ids = (llama_cpp.llama_token * (len(raw) + 16))()
    return ids[: llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, True)]


def transformers_ids(folder: str, texts: list[str]) -> list[list[int]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def main() -> None:
    request = json.load(sys.stdin)
    answer = llama_ids(request["gguf"], request["texts"])
    if request["folder"] and not answer["problem"]:
        answer["theirs"] = transformers_ids(request["folder"], request["texts"])
    print("\n" + json.dumps(answer))


main()
