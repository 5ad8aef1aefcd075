"""Models on disk, read as their exporters wrote them.

Which inputs, outputs and attention layers there are is read from the graph; configuration files add what a graph cannot
say: token ids, the context, names that an exporter may choose. `_places` finds the files, `_genai` and `_huggingface`
read the two families of configuration, `_read` puts a `ModelLayout` together, `_inspect` also describes what is refused.
"""

from inferos.runtime.layout._genai import CONFIG_NAME
from inferos.runtime.layout._inspect import Inspection, inspect_model
from inferos.runtime.layout._pasts import Past
from inferos.runtime.layout._places import find_model
from inferos.runtime.layout._read import read_layout
from inferos.runtime.layout._types import (
    HANDLE_INPUT,
    LENGTHS_INPUT,
    TOTAL_INPUT,
    AttentionLayer,
    Facts,
    ModelLayout,
    Place,
)

__all__ = [
    "AttentionLayer",
    "CONFIG_NAME",
    "Facts",
    "HANDLE_INPUT",
    "Inspection",
    "LENGTHS_INPUT",
    "ModelLayout",
    "Past",
    "Place",
    "TOTAL_INPUT",
    "find_model",
    "inspect_model",
    "read_layout",
]
