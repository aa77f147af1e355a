"""Running a model that does not fit in memory, one decoder layer at a time.

    texts -> tokens -> StreamedModel.embed -> layer 0 -> layer 1 -> ... -> head

What needs activations stands on this: importance matrices, sensitivity, GPTQ, evaluation.
It knows none of them. torch is imported here, so nothing outside a command's body may import it.
"""
