"""qwq-quant: make an open-weight model smaller, and know what was lost.

Importing `quant` imports neither torch nor transformers; those load inside the functions
that need them.
"""

__version__ = "0.1.0"
