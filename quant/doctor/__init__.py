"""Known defects of published models: how each is seen, what it does, how it is mended.

Each check is one entry of a room's table; `checks.CHECKS` is all of them. A check looks at a
`Patient`, an opened model with its small files read once, and says what it saw and where. What the
defect does to people, and the remedy, stand in the entry, so that a finding teaches.

    tokens.py    pad, end and other special tokens
    template.py  the chat template: rendered in a child process, never here
    rope.py      rotary settings that are incomplete or not needed
    family.py    values that the model's recipe expects
    files.py     tokenizer, shards, types, tied embeddings, NaN
    gguf.py      what llama.cpp would silently ignore in a GGUF file, or do twice
"""
