"""How much was lost: two models on the same text, on one scale, whatever their formats.

    texts -> chunks of tokens -> Runner (GGUF, folder, streamed) -> logits
    logits + the reference's   -> PositionScores -> Statistics, under llama.cpp's names

    with open_runner(reference) as a, open_runner(candidate) as b:
        chunks = cut_chunks(a, read_texts(path), n_ctx=512)
        print(compare(a, b, chunks).kld)

Figures agree with llama.cpp's `llama-perplexity --kl-divergence`, so that they can be held against
those that people publish. Nothing here imports torch, transformers or llama_cpp before it runs one.
"""
