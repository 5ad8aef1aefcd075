"""Models that run: layouts, the rewrite, sessions, sampling, text, and the decode loop over them.

Nothing is imported here, so that a part without onnxruntime (sampler, tokenizer, chat) loads without it.
"""

__all__: list[str] = []
