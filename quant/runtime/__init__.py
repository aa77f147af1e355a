"""How to run a model so that it does not loop: what to type, and the files to go with it.

The same settings have another name, another default and another limit in every program; one room
for each says what it can express and, in a note, what it cannot.
"""

from quant.runtime import llama_cpp, ollama, transformers, vllm

ENGINES = {
    "llama.cpp": llama_cpp.launch,
    "ollama": ollama.launch,
    "vllm": vllm.launch,
    "transformers": transformers.launch,
}
