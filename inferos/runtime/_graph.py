"""Reading a decoder's ONNX graph: where its weights lie, and which attention it computes (`inferos.runtime.forms`).

Nothing here loads external data: a model with gigabytes of weights is a few megabytes of graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from inferos.errors import ModelError
from inferos.runtime.forms import (
    DTYPE_KEY,
    OUR_DOMAIN,
    OUR_OP,
    AttentionNode,
    attention_nodes,
    subgraphs,
    tensor_shape,
    uses,
)

__all__ = [
    "DTYPE_KEY",
    "OUR_DOMAIN",
    "OUR_OP",
    "AttentionNode",
    "attention_nodes",
    "external_files",
    "load_graph",
    "subgraphs",
    "tensor_shape",
    "uses",
]


def load_graph(path: Path) -> onnx.ModelProto:
    """The model at `path`, external data not loaded.

    Raises
    ------
    ModelError
        If the file is missing, truncated, or not a model.
    """
    if not path.is_file():
        raise ModelError(f"load_graph: {path} does not exist")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(f"load_graph: {path.name} is not a whole ONNX model ({error})") from error
    # A file cut between two fields still parses: what is missing shows.
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise ModelError(f"load_graph: {path.name} is not a whole ONNX model: it has no nodes, outputs or opset")
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant of the graph and of its subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
        for body in subgraphs(node):
            yield from _tensors(body)


def _inside(folder: Path, location: str, tensor: str) -> Path:
    """The external file `location`, refused where it leaves `folder`."""
    pure = PurePosixPath(location.replace("\\", "/"))
    escapes = pure.is_absolute() or PureWindowsPath(location).drive or ".." in pure.parts
    path = folder / pure
    if not location or escapes or not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"external data of {tensor!r}: {location!r} lies outside {folder}; copy the file into it")
    return path


def external_files(model: onnx.ModelProto, folder: Path) -> tuple[Path, ...]:
    """The files beside the model that hold its external data, checked to exist, to be inside `folder` and long enough.

    Raises
    ------
    ModelError
        Naming the tensor, its location and what is wrong with it.
    """
    found: dict[str, Path] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        path = found.get(location)
        if path is None:
            path = found[location] = _inside(folder, location, tensor.name)
            if not path.is_file():
                raise ModelError(f"external data of {tensor.name!r}: {location!r} is missing from {folder}")
        try:
            end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        except ValueError:
            raise ModelError(f"external data of {tensor.name!r}: offset or length is no number") from None
        if end > path.stat().st_size:
            raise ModelError(
                f"external data of {tensor.name!r}: ends at byte {end} of {location!r}, which has {path.stat().st_size}"
            )
    return tuple(found.values())
