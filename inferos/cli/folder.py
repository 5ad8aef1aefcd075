"""`inferos rewrite`: a model folder whose attention is inferos' op."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inferos.cli import _output
from inferos.cli._options import DebugOption, JsonOption, ModelArgument

__all__ = ["rewrite"]


def rewrite(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The folder to write.  [default: beside it, with -inferos]")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--for", metavar="genai", help="Fail where onnxruntime-genai could not load the folder."),
    ] = None,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Write a folder whose attention is inferos' op; the model's own is left as it is."""
    _output.check_json_path(json_path)
    from inferos.kv import library_path
    from inferos.runtime.model import resolve_model
    from inferos.runtime.rewrite import rewrite as rewrite_folder

    report = rewrite_folder(resolve_model(model), out, host=host)
    console = _output.console(json_path)
    what = "written" if report.changed else "nothing to do, it holds this model already"
    console.print(f"{report.folder}: {what}; {len(report.layers)} attention nodes", soft_wrap=True)
    for layer in report.layers:
        window = "" if layer.local_window < 0 else f", sees {layer.local_window} tokens before its own"
        console.print(
            f"  {layer.name}: {layer.heads}/{layer.kv_heads} heads of {layer.head_dim}{window}", soft_wrap=True
        )
    if report.changed:
        console.print(f"files that share the source's bytes: {len(report.linked)}, copied: {len(report.copied)}")
    if host is not None and report.library == "symlink":
        console.print(
            f"libinferos lies on another file system: onnxruntime-genai loads it only in a process whose working "
            f"folder is above {library_path()}",
            soft_wrap=True,
        )
    _output.write_json(
        json_path,
        {
            "schema": "inferos.rewrite-report/1",
            "source": str(report.source),
            "folder": str(report.folder),
            "changed": report.changed,
            "library": report.library or None,
            "layers": [
                {
                    "name": layer.name,
                    "heads": layer.heads,
                    "kv_heads": layer.kv_heads,
                    "head_dim": layer.head_dim,
                    "local_window": None if layer.local_window < 0 else layer.local_window,
                }
                for layer in report.layers
            ],
            "linked": list(report.linked),
            "copied": list(report.copied),
        },
    )
