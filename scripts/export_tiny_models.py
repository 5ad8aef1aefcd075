"""Export decoders of transformers' tiny configurations for real, and check that inferos reads and computes every one.

The tests make graphs by hand; this makes them with the tools people use, which want different versions of transformers:

    pip install "optimum-onnx==0.1.0" "transformers<4.58" torch onnxruntime onnxscript
    python scripts/export_tiny_models.py OUT --tool optimum --tool variants --tool torch
    pip install "transformers>=5.10" onnxruntime-genai onnx_ir
    python scripts/export_tiny_models.py OUT --tool genai
    python scripts/export_tiny_models.py OUT --check          (needs inferos only)

`--check` feeds 128 tokens to every folder in OUT, through ONNX Runtime's attention and through inferos' over an FP16
cache, and gives one record a folder: the largest difference of logits, the share of equal choices, the layers' forms, or
why the model is refused. Weights are random, so a choice may be a tie. Folders for GPUs may have nodes that ONNX Runtime's
CPU provider does not run as they stand: `stock_fails` says why, and `same_as` compares with another folder of the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOKENS, PROMPT = 128, 96
_GAIN = 3.0  # random weights as transformers draws them are so small that attention is flat
_SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
_GEMMA = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}


def configurations() -> dict[str, Any]:
    """A tiny configuration of each architecture."""
    import transformers as t

    without_groups = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    return {
        "bloom": t.BloomConfig(vocab_size=96, hidden_size=64, n_layer=3, n_head=4),
        "codegen": t.CodeGenConfig(**_GPT, n_ctx=512, rotary_dim=8),
        "cohere": t.CohereConfig(**_SIZES),
        "gemma": t.GemmaConfig(**_SIZES, head_dim=32),
        "gemma2": t.Gemma2Config(**_SIZES, **_GEMMA, attn_logit_softcapping=5.0),
        "gemma3": t.Gemma3TextConfig(**_SIZES, **_GEMMA),
        "gpt2": t.GPT2Config(**_GPT, bos_token_id=1, eos_token_id=2),
        "gpt_bigcode": t.GPTBigCodeConfig(**_GPT),
        "gpt_neo": t.GPTNeoConfig(
            vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=512, window_size=16,
        ),
        "gpt_neox": t.GPTNeoXConfig(**without_groups, rotary_pct=0.5),
        "granite": t.GraniteConfig(**_SIZES),
        "llama": t.LlamaConfig(**_SIZES, architectures=["LlamaForCausalLM"]),
        "mistral": t.MistralConfig(**_SIZES, sliding_window=16),
        "mpt": t.MptConfig(vocab_size=96, d_model=64, n_layers=3, n_heads=4, max_seq_len=512),
        "olmo2": t.Olmo2Config(**_SIZES),
        "opt": t.OPTConfig(
            vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=512, word_embed_proj_dim=64,
        ),
        "phi": t.PhiConfig(**without_groups, partial_rotary_factor=0.5),
        "phi3": t.Phi3Config(**_SIZES, sliding_window=16),
        "qwen2": t.Qwen2Config(**_SIZES),
        "qwen3": t.Qwen3Config(**_SIZES, head_dim=32),
        "smollm3": t.SmolLM3Config(**_SIZES),
    }  # fmt: skip


def _model(config: Any, attention: str | None = None, dtype: Any = None) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(_GAIN)
    return model.to(dtype) if dtype is not None else model


def _optimum(out: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Optimum's exporter: attention spelled out, from PyTorch's fused attention and from transformers' eager one."""
    import torch
    from optimum.exporters.onnx import onnx_export_from_model

    def export(folder: Path, config: Any, attention: str | None, dtype: Any = None) -> None:
        model = _model(config, attention, dtype)
        onnx_export_from_model(model, folder, task="text-generation-with-past", do_validation=False)

    made = configurations()
    for name, config in made.items():
        yield f"optimum-{name}", lambda f=out / f"optimum-{name}", c=config: export(f, c, None)  # type: ignore[misc]
    for name in ("gemma2", "gpt2", "llama", "phi", "qwen2"):
        folder = out / f"optimum-eager-{name}"
        yield folder.name, lambda f=folder, c=made[name]: export(f, c, "eager")  # type: ignore[misc]
    for name in ("gpt2", "llama"):
        folder = out / f"optimum-merged-{name}"
        yield folder.name, lambda f=folder, c=made[name]: _merged(f, c)  # type: ignore[misc]
    folder = out / "optimum-float16-llama"
    yield folder.name, lambda: export(folder, made["llama"], None, torch.float16)


def _merged(folder: Path, config: Any) -> None:
    """What optimum wrote before: one If between a decoder without and one with past, chosen by use_cache_branch."""
    from optimum.exporters.onnx import model_configs
    from optimum.exporters.onnx.convert import export
    from optimum.onnx import merge_decoders

    kind = {"gpt2": model_configs.GPT2OnnxConfig, "llama": model_configs.LlamaOnnxConfig}[config.model_type]
    folder.mkdir(parents=True, exist_ok=True)
    model, parts = _model(config), [folder / "decoder_model.onnx", folder / "decoder_with_past_model.onnx"]
    for part, with_past in zip(parts, (False, True), strict=True):
        description = kind(config, task="text-generation", use_past=True, use_past_in_inputs=with_past)
        export(model, description, part, opset=18)
    merge_decoders(*parts, save_path=folder / "decoder_model_merged.onnx", strict=False)
    for part in parts:
        part.unlink()
    config.save_pretrained(folder)


def _variants(out: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is made of optimum's exports: INT8 and 4-bit weights, FP16, ONNX Runtime's own graph optimizations."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    def q4(source: Path, target: Path) -> None:
        quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
        quantizer.process()
        onnx.save(quantizer.model.model, target)

    def optimized(source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    kinds: dict[str, Callable[[Path, Path], None]] = {
        "fp16": lambda a, b: onnx.save(convert_float_to_float16(onnx.load(a)), b),
        "fp16-keep-io": lambda a, b: onnx.save(convert_float_to_float16(onnx.load(a), keep_io_types=True), b),
        "int8": lambda a, b: quantize_dynamic(a, b, weight_type=QuantType.QInt8),
        "optimized": optimized,
        "q4": q4,
        "uint8": lambda a, b: quantize_dynamic(a, b, weight_type=QuantType.QUInt8),
    }
    for name in ("llama", "qwen3"):
        source = out / f"optimum-{name}"
        for kind, make in kinds.items():
            target = out / f"optimum-{kind}-{name}"

            def write(source: Path = source, target: Path = target, make: Any = make) -> None:
                target.mkdir(exist_ok=True)
                (target / "config.json").write_bytes((source / "config.json").read_bytes())
                make(source / "model.onnx", target / "model.onnx")

            yield target.name, write


def _torch(out: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """torch.onnx with opset 23: ONNX's Attention behind a Concat."""
    made = configurations()
    for name in ("gemma3", "gpt2", "llama", "phi", "qwen3"):
        folder = out / f"torch23-{name}"
        yield folder.name, lambda f=folder, c=made[name]: _torch_export(f, c, 23)  # type: ignore[misc]


def _torch_export(folder: Path, config: Any, opset: int) -> None:
    import torch
    from torch.export import Dim
    from transformers.cache_utils import DynamicCache

    class Flat(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            cache = DynamicCache.from_legacy_cache(tuple((key, value) for key, value in past))
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows, past, new = 2, 5, 3
    pasts = [tuple(torch.randn(rows, kv_heads, past, size) for _ in "kv") for _ in range(layers)]
    positions = (past + torch.arange(new))[None].repeat(rows, 1)
    mask = torch.ones(rows, past + new, dtype=torch.int64)
    both, tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    program = torch.onnx.export(
        Flat(_model(config)), (torch.randint(0, 90, (rows, new)), mask, positions, pasts), dynamo=True,
        opset_version=opset, verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes={
            "input_ids": both, "attention_mask": both, "position_ids": both, "past": [(tokens, tokens)] * layers,
        },
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    program.save(str(folder / "model.onnx"))
    config.save_pretrained(folder)


def _genai(out: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """onnxruntime-genai's builder: GroupQueryAttention, for each provider as it likes it."""
    import onnxruntime_genai

    sys.path.insert(0, str(Path(onnxruntime_genai.__file__).parent))
    made = configurations()
    for name in ("gemma2", "llama", "mistral", "qwen2", "qwen3"):
        for precision, provider in (
            ("fp32", "cpu"), ("int4", "cpu"), ("fp16", "dml"), ("fp16", "webgpu"), ("fp16", "cuda"), ("int4", "cuda"),
        ):  # fmt: skip
            folder = out / f"genai-{provider}-{precision}-{name}"
            yield folder.name, lambda f=folder, c=made[name], p=precision, e=provider: _genai_build(f, c, p, e)  # type: ignore[misc]


def _genai_build(folder: Path, config: Any, precision: str, provider: str) -> None:
    from models import builder  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source = folder.parent / "checkpoints" / config.model_type
    if not source.exists():
        _model(config).save_pretrained(source)
        words = models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")  # noqa: S106  a word, no secret
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(source)
    paths = ("", str(source), str(folder), precision, provider, str(folder.parent / "cache"))
    builder.create_model(*paths, **builder.parse_extra_options(*paths, []))


TOOLS = {"genai": _genai, "optimum": _optimum, "torch": _torch, "variants": _variants}


def export(out: Path, tools: list[str]) -> int:
    """Make every folder; those that a tool cannot make are reported and counted."""
    failed = 0
    for tool in tools:
        for name, make in TOOLS[tool](out):
            try:
                make()
                report = "exported"
            except Exception as error:  # noqa: BLE001  whatever a tool throws: the next model may work
                failed += 1
                report = f"{type(error).__name__}: {str(error)[:120]}"
            sys.stdout.write(f"{name}: {report}\n")
    return failed


def check(folder: Path) -> dict[str, Any]:
    """What inferos makes of one folder."""
    import numpy as np

    from inferos.errors import InferosError
    from inferos.runtime.layout import read_layout

    record: dict[str, Any] = {"model": folder.name}
    try:
        layout = read_layout(folder)
    except InferosError as error:
        return record | {"refused": str(error)}
    record["layers"] = sorted(
        {f"{x.form}, {x.heads}/{x.kv_heads}x{x.head_dim}, {x.local_window}" for x in layout.layers}
    )
    ids = np.random.default_rng(0).integers(3, 90, TOKENS)
    ours = _logits(folder, "f16", ids)
    try:
        stock = _logits(folder, "off", ids)
    except InferosError as error:
        record["stock_fails"] = str(error)[:300]
        sibling = folder.with_name(f"genai-dml-fp16-{folder.name.rpartition('-')[2]}")
        if "fp16" not in folder.name or not sibling.exists():
            return record
        record["same_as"], stock = sibling.name, _logits(sibling, "off", ids)
    return record | {
        "largest_difference": float(np.abs(stock - ours).max()),
        "largest_logit": float(np.abs(stock).max()),
        "same_choice": float((stock.argmax(-1) == ours.argmax(-1)).mean()),
    }


def _logits(folder: Path, kv: str, ids: Any) -> Any:
    """Logits (tokens, vocabulary): a prompt, then token by token."""
    import numpy as np

    from inferos.runtime.session import open_session

    sequence = open_session(folder, kv=kv, threads=1).sequence()
    rows = [sequence.feed_all(ids[:PROMPT]), *(sequence.feed(ids[at : at + 1])[None] for at in range(PROMPT, TOKENS))]
    return np.concatenate(rows)


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the exports, one folder each")
    parser.add_argument("--tool", action="append", choices=sorted(TOOLS), default=[], help="what to export with")
    parser.add_argument("--check", action="store_true", help="compare every export in OUT")
    parser.add_argument("--json", type=Path, help="write what --check finds here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    failed = export(options.out, options.tool)
    if options.check:
        import onnxruntime

        import inferos

        records = []
        for folder in sorted(path.parent for path in options.out.glob("*/*model*.onnx")):
            records.append(check(folder))
            sys.stdout.write(json.dumps(records[-1]) + "\n")
        if options.json:
            versions = {"inferos": inferos.__version__, "onnxruntime": onnxruntime.__version__}
            report = {"schema": "inferos.export-check/1", "tokens": TOKENS, "versions": versions, "models": records}
            options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
