"""How fast a model generates and how much memory it takes, on this machine: Qwen's tables.

cases.py    what is run: batch, prompt, generated tokens
planned.py  bytes of weights and cache by arithmetic, where nothing is run
measure.py  one case, in a process of its own: seconds, peak, bytes of weights and cache
profile.py  all of them, for a model in bf16, with an int8 KV cache, and quantized
report.py   CSV, JSON and the figure
"""
