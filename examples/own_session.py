"""Greedy decoding with one's own onnxruntime session over a compressed KV cache. usage: python own_session.py MODEL_FOLDER [PROMPT]

Buffers are bound once; a step copies one token id in and reads the logits where ONNX Runtime wrote them.
"""

import sys

import numpy as np
import onnxruntime as ort
import tokenizers

import inferos
from inferos.runtime.model import resolve_model

TOKENS = 60


def main(model: str, prompt: str = "It was a") -> None:
    folder = inferos.rewrite(resolve_model(model)).folder  # once; needs no library beside the model
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    options = ort.SessionOptions()
    inferos.register(options)  # the op
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    vocabulary = session.get_outputs()[0].shape[2]

    with inferos.new_cache(folder, kv="int8") as cache:
        ids = tokenizer.encode(prompt).ids
        feeds = {"input_ids": [ids], "attention_mask": np.ones((1, len(ids))), "inferos_handle": cache.handle_input}
        logits = session.run(["logits"], {name: np.asarray(value, np.int64) for name, value in feeds.items()})[0]
        ids.append(int(logits[0, -1].argmax()))

        token = np.zeros((1, 1), np.int64)
        mask = np.ones((1, len(ids) + TOKENS), np.int64)
        scores = np.zeros((1, 1, vocabulary), np.float32)
        binding = session.io_binding()
        binding.bind_input("input_ids", "cpu", 0, np.int64, token.shape, token.ctypes.data)
        binding.bind_input("inferos_handle", "cpu", 0, np.int64, (1,), cache.handle_input.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, scores.shape, scores.ctypes.data)
        for _ in range(TOKENS):
            token[0, 0] = ids[-1]
            binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, len(ids)), mask.ctypes.data)  # grows by one
            session.run_with_iobinding(binding)
            ids.append(int(scores.argmax()))

        print(tokenizer.decode(ids))
        cache.commit()  # a step that follows commits the one before; this is the last
        print(f"{cache.length} tokens in {cache.stats().total_bytes} bytes of KV", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
