"""Generate with onnxruntime-genai over a compressed KV cache. usage: python genai_host.py MODEL_FOLDER [PROMPT]

MODEL_FOLDER is an onnxruntime-genai folder; `reference` is the small model that inferos brings along.
"""

import sys

import onnxruntime_genai as og

import inferos
from inferos.runtime.model import resolve_model


def main(model: str, prompt: str = "It was a") -> None:
    # Written once, beside the model; `inferos rewrite MODEL --for genai` does the same.
    folder = inferos.rewrite(resolve_model(model), host="genai").folder

    engine = og.Model(str(folder))
    tokenizer = og.Tokenizer(engine)
    params = og.GeneratorParams(engine)
    params.set_search_options(max_length=64, do_sample=False)
    generator = og.Generator(engine, params)

    cache = inferos.new_cache(folder, kv="int8")
    generator.set_model_input("inferos_handle", cache.handle_input)  # the line to add

    generator.append_tokens(tokenizer.encode(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    print(tokenizer.decode(generator.get_sequence(0)))
    print(f"{cache.length} tokens in {cache.stats().total_bytes} bytes of KV", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
