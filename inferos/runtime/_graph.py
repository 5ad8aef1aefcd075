"""Reading a decoder's ONNX graph: where its weights lie, and which attention it computes (`inferos.runtime.forms`).

Nothing here loads weights: a model with gigabytes of them is a few megabytes of graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from inferos.errors import InferosError, ModelError
from inferos.runtime.forms import (
    DTYPE_KEY,
    OUR_DOMAIN,
    OUR_OP,
    AttentionNode,
    attention_nodes,
    is_table,
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
    "damage_named",
    "data_folder",
    "external_files",
    "load_graph",
    "subgraphs",
    "tensor_shape",
    "uses",
]


_WHOLE = (TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64)
_BYTES = (TensorProto.INT8, TensorProto.UINT8)
_LARGEST_TABLE, _LARGEST_VECTOR = 1 << 24, 1 << 16  # values


def load_graph(path: Path) -> onnx.ModelProto:
    """The model at `path`, external data not loaded but for small whole numbers and square tables of them.

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
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and _tells_a_mask(tensor):
            _load_beside(tensor, path)
    return model


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Make a ModelError of whatever a graph does to those who look into it.

    A graph may lack or contradict anything, and what reads it (onnx, numpy, ONNX Runtime) has no common error.
    """
    try:
        yield
    except (InferosError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path.name}: its graph is damaged or not understood ({what})") from error


def _tells_a_mask(tensor: TensorProto) -> bool:
    """Whether a constant may be a mask, an index or a shape: what decides the meaning of attention is read."""
    size = math.prod(tensor.dims)
    square = len(tensor.dims) >= 2 and tensor.dims[-1] == tensor.dims[-2]
    table = is_table(tensor.dims) or (square and tensor.data_type in (*_WHOLE, *_BYTES))
    return bool(size <= (_LARGEST_TABLE if table else _LARGEST_VECTOR if tensor.data_type in _WHOLE else 0))


def _load_beside(tensor: TensorProto, model_path: Path) -> None:
    """Bring an external constant into the model. One that cannot be read stays outside, where `external_files` checks it."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        path = _inside(model_path, entries.get("location", ""), tensor.name)
        with path.open("rb") as file:
            file.seek(int(entries.get("offset", "0")))
            data = file.read(int(entries["length"]))
    except (KeyError, ModelError, OSError, ValueError):
        return
    if len(data) != math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize:
        return
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = data


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


def _inside(model_path: Path, location: str, tensor: str) -> Path:
    """The external file `location`, refused where it leaves the model's folder.

    Where the model itself is a link, as in the cache of huggingface_hub, the file may also lie where the model really
    does: links that somebody made beside both, not a path that the model asks for.
    """
    folder = model_path.parent
    pure = PurePosixPath(location.replace("\\", "/"))
    escapes = pure.is_absolute() or PureWindowsPath(location).drive or ".." in pure.parts
    path = folder / pure
    allowed = (folder.resolve(), model_path.resolve().parent)
    if not location or escapes or not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ModelError(f"external data of {tensor!r}: {location!r} lies outside {folder}; copy the file into it")
    return path


def data_folder(model: onnx.ModelProto, model_path: Path) -> Path:
    """The folder that a session of the graph's bytes finds external data in.

    ONNX Runtime follows no link out of that folder. Where there is one, the locations in `model` are changed to those
    of the files themselves.
    """
    folder, real = model_path.parent, model_path.resolve().parent
    entries = [
        entry
        for tensor in _tensors(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    files = {entry.value: (folder / entry.value).resolve() for entry in entries}
    if not files or all(path.is_relative_to(folder.resolve()) for path in files.values()):
        return folder
    for entry in entries:
        entry.value = files[entry.value].relative_to(real).as_posix()
    return real


def external_files(model: onnx.ModelProto, model_path: Path) -> tuple[Path, ...]:
    """The files beside the model that hold its external data, checked to exist, to be inside its folder and long enough.

    Raises
    ------
    ModelError
        Naming the tensor, its location and what is wrong with it.
    """
    folder = model_path.parent
    found: dict[str, Path] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        path = found.get(location)
        if path is None:
            path = found[location] = _inside(model_path, location, tensor.name)
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
