"""From stock attention to inferos': a decoder's graph without past and present.

Of a decoder that chooses between a branch without and one with past, the branch with past is all that is left.

Every attention, in whatever form (`inferos.runtime.forms`), becomes ``inferos::CompressedAttention`` with its own
``layer``. The cache's inputs and outputs go; ``inferos_handle`` (int64, one per row) names each row's cache. A folder
keeps attention_mask, so that any host that runs the export runs the rewritten model with one more input. In our own
sessions two small inputs take the place of the mask, whose length would grow with the context: ``inferos_seqlens_k``
(int32, per row: total tokens minus 1) and ``inferos_total_length`` (int32 scalar: the longest row). Rows of a first
prompt that are shorter than others are padded behind, as GroupQueryAttention wants them, whatever the export took.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from inferos.errors import ConfigError, ModelError, UnsupportedError
from inferos.kv import library_path
from inferos.runtime._branches import branch_input, inline_branch
from inferos.runtime._graph import (
    DTYPE_KEY,
    OUR_DOMAIN,
    OUR_OP,
    AttentionNode,
    attention_nodes,
    external_files,
    load_graph,
    tensor_shape,
)
from inferos.runtime._surgery import MASK_LENGTHS, MASK_TOTAL, Surgery, drop_dead, keep, tensors_alive
from inferos.runtime.forms import SHARED_POSITIONS_KEY, in_order
from inferos.runtime.layout import (
    CONFIG_NAME,
    HANDLE_INPUT,
    LENGTHS_INPUT,
    TOTAL_INPUT,
    AttentionLayer,
    ModelLayout,
    read_layout,
)

__all__ = ["HOSTS", "RewriteReport", "rewrite", "rewrite_in_place", "rewrite_model"]

_LENGTHS, _TOTAL = 3, 4  # positions of the lengths among our op's inputs
_VERSION = "1"  # of the rewritten form; part of the marker, so that a newer inferos writes a folder again
_VERSION_KEY = "inferos.rewrite"
_LAYERS_KEY = "inferos.layers"
_MARKER = "inferos_rewrite.json"
HOSTS = ("genai",)
# Files beside the model that a loader or a tokenizer reads.
_COPIED_SUFFIXES = frozenset({".jinja", ".json", ".md", ".model", ".spm", ".tiktoken", ".txt"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What `rewrite` did.

    Attributes
    ----------
    source, folder : pathlib.Path
        The model read and the folder that holds the rewritten one.
    changed : bool
        False where `folder` already held exactly this result.
    layers : tuple of AttentionLayer
        The attention nodes, in the order of the cache's layers.
    linked, copied : tuple of str
        Files that share their bytes on disk with the source or, as the library, with the package; and those copied.
    library : str
        How onnxruntime-genai finds the op in the folder: hardlink or symlink; empty where it does not.
    """

    source: Path
    folder: Path
    changed: bool
    layers: tuple[AttentionLayer, ...]
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    library: str = ""


def rewrite_model(
    model: onnx.ModelProto, *, head_dim: int | None = None, scalar_lengths: bool = True
) -> onnx.ModelProto:
    """The model with inferos' attention; its external data is neither read nor needed.

    Parameters
    ----------
    model : onnx.ModelProto
        A decoder whose attention has one of the known forms, or a rewritten one. Not changed.
    head_dim : int, optional
        Values per head, used where the graph does not say.
    scalar_lengths : bool, default True
        Whether the lengths become inputs of their own; else they come from attention_mask as before.

    Returns
    -------
    onnx.ModelProto
        A new model, or `model` itself where nothing is left to do.

    Raises
    ------
    UnsupportedError
        Where attention has a form inferos does not compute; the message names the node and the reason.
    ModelError
        Where the graph has tensors of our names already.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result if rewrite_in_place(result, head_dim=head_dim, scalar_lengths=scalar_lengths) else model


def rewrite_in_place(model: onnx.ModelProto, *, head_dim: int | None = None, scalar_lengths: bool = True) -> bool:
    """As `rewrite_model`, on a model that nobody else uses; whether anything changed.

    Where it raises, at most the choice between two branches was made.
    """
    branch = branch_input(model.graph)
    if branch:
        inline_branch(model.graph, branch)
    nodes = attention_nodes(model, head_dim)
    stock = not nodes[0].rewritten
    lengths = scalar_lengths and LENGTHS_INPUT not in {value.name for value in model.graph.input}
    if not stock and not lengths:
        return False
    _check_names(
        model.graph, ({HANDLE_INPUT} if stock else set()) | ({LENGTHS_INPUT, TOTAL_INPUT} if lengths else set())
    )
    graph = model.graph
    alive = tensors_alive(in_order(graph.node), (value.name for value in graph.output))
    if stock:
        _replace_attention(model, nodes, lengths=lengths)
    else:
        _check_lengths([(node.name, list(node.node.input[_LENGTHS : _TOTAL + 1])) for node in nodes])
        _rename_lengths(graph)
    if lengths:
        _add_lengths(graph)
    drop_dead(graph, alive)
    return True


def _replace_attention(model: onnx.ModelProto, nodes: tuple[AttentionNode, ...], *, lengths: bool) -> None:
    graph = model.graph
    _check_lengths([(n.name, [n.call.lengths, n.call.total]) for n in nodes if n.call is not None])
    surgery = Surgery(model, nodes, *((LENGTHS_INPUT, TOTAL_INPUT) if lengths else ("", "")))
    made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in surgery.nodes]
    del graph.node[:]
    graph.node.extend(made)
    left = {name for node in made for name in node.input}
    graph.initializer.extend(tensor for tensor in surgery.constants if tensor.name in left)
    presents = {name for node in nodes for name in (node.present_key, node.present_value)}
    keep(graph.output, lambda value: value.name not in presents)
    graph.input.append(helper.make_tensor_value_info(HANDLE_INPUT, TensorProto.INT64, [_batch(graph)]))
    if not any(opset.domain == OUR_DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(OUR_DOMAIN, 1))
    _add_metadata(model, nodes)


def _add_lengths(graph: onnx.GraphProto) -> None:
    graph.input.extend([
        helper.make_tensor_value_info(LENGTHS_INPUT, TensorProto.INT32, [_batch(graph)]),
        helper.make_tensor_value_info(TOTAL_INPUT, TensorProto.INT32, []),
    ])  # fmt: skip


def _rename_lengths(graph: onnx.GraphProto) -> None:
    """Lengths out of a mask become inputs."""
    for node in graph.node:
        if node.domain == OUR_DOMAIN and node.op_type == OUR_OP:
            node.input[_LENGTHS], node.input[_TOTAL] = LENGTHS_INPUT, TOTAL_INPUT
        for at, name in enumerate(node.input):
            if name in (MASK_LENGTHS, MASK_TOTAL):
                node.input[at] = LENGTHS_INPUT if name == MASK_LENGTHS else TOTAL_INPUT


def _check_lengths(lengths: list[tuple[str, list[str]]]) -> None:
    """One pair of lengths serves all layers only if all layers had the same."""
    for name, own in lengths:
        if own != lengths[0][1]:
            raise UnsupportedError(f"node {name!r}: its lengths (seqlens_k, total) are not the first layer's")


def _check_names(graph: onnx.GraphProto, ours: set[str]) -> None:
    taken = {value.name for value in (*graph.input, *graph.initializer)} | {
        name for node in graph.node for name in node.output
    }
    clash = sorted(taken & ours)
    if clash:
        raise ModelError(f"rewrite_model: the graph already has a tensor {clash[0]!r}")


def _batch(graph: onnx.GraphProto) -> int | str | None:
    """The batch extent, as the graph's token ids have it."""
    shapes = (tensor_shape(value) for value in graph.input)
    return next((shape[0] for shape in shapes if len(shape) == 2), "batch_size")


def _add_metadata(model: onnx.ModelProto, nodes: tuple[AttentionNode, ...]) -> None:
    layers = [
        {"name": n.name, "kv_heads": n.kv_heads, "head_dim": n.head_dim, "local_window_size": n.window} for n in nodes
    ]
    entries = {_VERSION_KEY: _VERSION, DTYPE_KEY: nodes[0].dtype, _LAYERS_KEY: json.dumps(layers)}
    if nodes[0].shared_positions:
        entries[SHARED_POSITIONS_KEY] = "1"
    keep(model.metadata_props, lambda entry: entry.key not in entries)
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def rewrite(folder: str | Path, out: str | Path | None = None, *, host: str | None = None) -> RewriteReport:
    """Write a folder whose model has inferos' attention and no past or present.

    Whatever ran the export runs the result: the inputs are the same but for the past, and one more, ``inferos_handle``
    (`inferos.KVCache.handle`, int64, one per row). onnxruntime finds the op by `inferos.register`, onnxruntime-genai by
    the folder's own genai_config.json, if it has one, which names a link to libinferos beside it.

    Parameters
    ----------
    folder : path
        A model as `inferos.runtime.layout.read_layout` takes it. Of several variants only the one that it chooses is
        rewritten; the path of an ONNX file chooses another.
    out : path, optional
        Where to write; default is the model's folder with "-inferos" appended. A folder written by an earlier rewrite of
        another state of the model, or for another build of inferos, is replaced; anything else there is left alone
        and refused.
    host : {"genai"}, optional
        genai: refuse where onnxruntime-genai could not load the folder.

    Returns
    -------
    RewriteReport
        Its `changed` is False where nothing had to be written: the same rewrite was there, or the model is
        rewritten already.

    Raises
    ------
    ConfigError
        If `host` is unknown.
    ModelError
        As `inferos.runtime.layout.read_layout`, and where `out` holds something else or cannot be written; for genai
        also where libinferos cannot be linked into it, or the model brings a custom op library of its own.
    UnsupportedError
        Naming the attention node that cannot be rewritten, and why.
    """
    if host is not None and host not in HOSTS:
        raise ConfigError(f"rewrite: host {host!r} is not one of {', '.join(HOSTS)}")
    layout = read_layout(folder)
    source = layout.folder.resolve()
    if layout.rewritten and out is None:
        link = _library_link(source)
        if host is not None and not link:
            raise ModelError(f"rewrite: {source} has no link to this libinferos; rewrite the model that it came from")
        return RewriteReport(source, source, False, layout.layers, (), (), link)
    target = Path(out).absolute() if out is not None else source.with_name(source.name + "-inferos")
    if target.resolve() == source:
        raise ModelError(f"rewrite: {target} is the model's own folder; name another one")
    marker = _marker(layout.model_path)
    existing = _read_marker(target)
    link = _library_link(target)
    stale = os.path.lexists(target / library_path().name) and not link
    if existing is not None and existing == marker and (link or (host is None and not stale)):
        return RewriteReport(source, target, False, read_layout(target).layers, (), (), link)
    if existing is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"rewrite: {target} exists and was not written by inferos; it is left alone")
    linked, copied = _write(layout, target, marker, host)
    return RewriteReport(source, target, True, read_layout(target).layers, linked, copied, _library_link(target))


def _marker(model: Path) -> dict[str, str]:
    """What makes two results the same."""
    digests = {}
    for name, path in (("source_sha256", model), ("library_sha256", library_path())):
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"schema": "inferos.rewrite/" + _VERSION, **digests, "library": str(library_path())}


def _read_marker(folder: Path) -> object | None:
    try:
        marker: object = json.loads((folder / _MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return marker


def _library_link(folder: Path) -> str:
    """Hardlink or symlink: how the folder shares the package's library; empty where it does not."""
    path = folder / library_path().name
    try:
        if not path.samefile(library_path()):
            return ""
    except OSError:
        return ""
    return "symlink" if path.is_symlink() else "hardlink"


def _write(
    layout: ModelLayout, target: Path, marker: dict[str, str], host: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write beside `target`, then rename: a reader sees the old folder, none, or the whole new one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"rewrite: cannot write into {target.parent}: {error}") from error
    try:
        linked, copied = _fill(layout, scratch / "new", marker, host)
        _swap(scratch / "new", target, scratch / "old")
    except OSError as error:
        raise ModelError(f"rewrite: cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _log.info("rewrote %s", target.name)
    return linked, copied


def _swap(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _fill(
    layout: ModelLayout, folder: Path, marker: dict[str, str], host: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    graphs = folder / layout.model_path.parent.relative_to(layout.folder)
    graphs.mkdir(parents=True)
    model = load_graph(layout.model_path)
    rewrite_in_place(model, head_dim=layout.layers[0].head_dim, scalar_lengths=False)
    (graphs / layout.model_path.name).write_bytes(model.SerializeToString())
    linked: list[str] = []
    copied: list[str] = []
    for path in external_files(model, layout.model_path):
        name = path.relative_to(layout.folder)
        (linked if _link_or_copy(path, folder / name) else copied).append(str(name))
    for path in sorted(layout.folder.iterdir()):
        known = path.suffix.lower() in _COPIED_SUFFIXES
        if layout.kind == "file":  # without a configuration it is anybody's folder
            known = known and path.name.startswith(("chat_template.", "tokenizer"))
        if known and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    if _offer_to_genai(folder, layout, required=host == "genai"):
        linked.append(library_path().name)
    (folder / _MARKER).write_text(json.dumps(marker, indent=1), "utf-8")
    return tuple(linked), tuple(copied)


def _offer_to_genai(folder: Path, layout: ModelLayout, *, required: bool) -> bool:
    """Let onnxruntime-genai find the model and the op; whether it can."""
    if layout.kind != "onnxruntime-genai":
        if required:
            raise ModelError(
                f"rewrite: {layout.folder} has no {CONFIG_NAME}, without which onnxruntime-genai loads nothing"
            )
        return False
    library = library_path()
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text("utf-8"))
    decoder = config["model"]["decoder"]
    decoder["filename"] = layout.model_path.name
    options = decoder.setdefault("session_options", {})
    theirs = options.get("custom_ops_library", library.name)
    if theirs != library.name:
        problem = f"{CONFIG_NAME} names {theirs!r} as its custom_ops_library, and onnxruntime-genai loads one"
    else:
        problem = _link_library(folder / library.name)
    if problem and required:
        raise ModelError(f"rewrite: {problem}")
    if problem:
        _log.warning("onnxruntime-genai cannot load %s: %s", folder.name, problem)
        return False
    options["custom_ops_library"] = library.name
    path.write_text(json.dumps(config, indent=2), "utf-8")
    return True


def _link_library(path: Path) -> str:
    """Why the package's library could not be linked as `path`; empty where it was.

    onnxruntime-genai loads a library that lies in the model's folder, links followed: so a hard link, and a symbolic
    one only helps a process that works in a folder above the package. A copy would be a second library, with
    sequences of its own.
    """
    library = library_path()
    try:
        os.link(library.resolve(), path)
    except OSError as error:
        try:
            path.symlink_to(library)
        except OSError:
            return f"{library} cannot be linked into {path.parent.name} ({error.strerror or error})"
    return ""


def _link_or_copy(source: Path, target: Path) -> bool:
    """True where the two share their bytes. A symlink would not do: ONNX Runtime refuses external data behind one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
