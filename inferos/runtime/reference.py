"""The embedded reference model: an onnxruntime-genai folder, written once into the user's cache.

The package carries the weights in compact form (inferos/assets). The folder's name contains a hash of those assets and
of the builder's version, so an upgrade never meets an old folder. It is written beside its place and renamed, so a
reader sees a whole folder or none, and two processes may build it at once. A manifest with the files' hashes is
checked on every use: a damaged or half folder is built again.

`INFEROS_CACHE_DIR` names another place than the platform's cache folder (Linux: ~/.cache/inferos).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np

from inferos.errors import ConfigError, ModelError

__all__ = ["CACHE_VARIABLE", "REFERENCE_NAME", "TRAINED_CONTEXT", "cache_folder", "reference_folder", "reference_words"]

REFERENCE_NAME = "reference"
CACHE_VARIABLE = "INFEROS_CACHE_DIR"
TRAINED_CONTEXT = 2048  # tokens; config.json repeats it and a test compares

# Part of the folder's name: raise it whenever the graph or a file beside it changes.
_BUILDER_VERSION = 1
_ASSETS = ("config.json", "reference.npz", "tokenizer.json")
_MANIFEST = "manifest.json"
_ATTEMPTS = 5

# A plain concatenation: the model was never trained to chat, but it continues a text and looks things up in it.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] != 'user' %}{{ '\\n' }}{% endif %}{% endfor %}"
)

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where inferos keeps files it can make again: `INFEROS_CACHE_DIR`, else the platform's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_cache_dir("inferos", appauthor=False))


def reference_words() -> tuple[str, ...]:
    """Words that the model saw as keys and values of recall documents; others it looks up far less reliably."""
    return tuple(_asset("words.txt").decode("utf-8").split())


def reference_folder() -> Path:
    """The folder of the reference model, built on first use.

    Returns
    -------
    pathlib.Path
        Holds model.onnx, genai_config.json, tokenizer.json, tokenizer_config.json and config.json.

    Raises
    ------
    ConfigError
        If the cache folder cannot be written.
    ModelError
        If the package's own assets are damaged.
    """
    assets = {name: _asset(name) for name in _ASSETS}
    digest = hashlib.sha256(f"builder {_BUILDER_VERSION}".encode())
    for name, content in assets.items():
        digest.update(hashlib.sha256(name.encode() + content).digest())
    target = cache_folder() / f"{REFERENCE_NAME}-{digest.hexdigest()[:16]}"
    if _intact(target):
        return target
    _log.info("building the reference model")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            _write_folder(fresh, assets)
            _put_in_place(fresh, target, Path(scratch))
    except OSError as error:
        raise ConfigError(
            f"reference_folder: cannot write {target} ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return target


def _asset(name: str) -> bytes:
    try:
        return (resources.files("inferos") / "assets" / name).read_bytes()
    except OSError as error:
        raise ModelError(f"the package's file assets/{name} cannot be read ({error}); install inferos again") from error


def _intact(folder: Path) -> bool:
    """Whether every file has the size and the hash that were noted when the folder was written."""
    try:
        noted = json.loads((folder / _MANIFEST).read_text("utf-8"))
        return bool(noted) and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in noted.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _put_in_place(fresh: Path, target: Path, scratch: Path) -> None:
    """Rename `fresh` to `target`; a whole folder that another process put there first wins."""
    for attempt in range(_ATTEMPTS):
        try:
            fresh.rename(target)
            return
        except OSError:
            if _intact(target):
                return
            if attempt + 1 == _ATTEMPTS:
                raise
        try:
            # A broken folder is in the way: it moves into our scratch folder and goes with it.
            target.rename(scratch / f"broken{attempt}")
        except FileNotFoundError:
            continue


def _write_folder(folder: Path, assets: dict[str, bytes]) -> None:
    # Here, because it imports onnx, which a run that finds its folder does not need.
    from inferos.runtime._reference_graph import build_model
    from inferos.runtime.decoder_graph import Architecture, genai_config

    try:
        config = json.loads(assets["config.json"])
        with np.load(io.BytesIO(assets["reference.npz"]), allow_pickle=False) as stored:
            weights = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"the package's reference model cannot be read ({error}); install inferos again") from error
    arch = Architecture.from_config(config)
    tokens = {"bos": config["bos_token_id"], "eos": config["eos_token_id"], "max_length": config["trained_context"]}
    files = {
        "model.onnx": build_model(arch, weights).SerializeToString(deterministic=True),
        "genai_config.json": _json_bytes(genai_config(arch, **tokens)),
        "tokenizer.json": assets["tokenizer.json"],
        "tokenizer_config.json": _json_bytes(_tokenizer_config(config)),
        "config.json": assets["config.json"],
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    noted = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / _MANIFEST).write_bytes(_json_bytes(noted))


def _tokenizer_config(config: dict[str, object]) -> dict[str, object]:
    special = "<|endoftext|>"
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": special,
        "eos_token": special,
        "unk_token": special,
        "pad_token": special,
        "add_bos_token": True,  # every training document started with it
        "add_prefix_space": False,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
