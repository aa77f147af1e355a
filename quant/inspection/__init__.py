"""What a model is, and what differs between two, as facts with the same names for any container.

A checkpoint says `num_hidden_layers`, a GGUF file `qwen2.block_count`; here both say `layers`, so
that any two models can be laid side by side, and a model beside its own GGUF file. Headers and
small files are read, and no weights but Llama 3's few rope factors.
"""
