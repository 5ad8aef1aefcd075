"""Execution providers as data: what each is for, and who keeps the KV cache of a model that runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Kind", "PROVIDERS", "Provider", "WHERE", "Where", "describe_provider"]

Kind = Literal["cpu", "gpu", "npu"]
Case = Literal["cpu", "gpu", "gpu_without_op", "npu"]


@dataclass(frozen=True, slots=True)
class Where:
    """What a user gets on one sort of provider.

    Parameters
    ----------
    title : str
    kv_owner : str
        Who holds K and V.
    compressed : str
        How far they are compressed.
    failover : str
        What a failed step costs.
    """

    title: str
    kv_owner: str
    compressed: str
    failover: str


WHERE: Mapping[Case, Where] = {
    "cpu": Where("CPU", "inferos", "fully", "from the cache: only the failed step is run again"),
    "gpu": Where(
        "DirectML, MIGraphX, CUDA and other GPU providers",
        "inferos, in host memory; attention is a CPU kernel between the provider's partitions",
        "fully; opt-in, and chosen by auto only where measured faster",
        "from the cache: only the failed step is run again",
    ),
    "gpu_without_op": Where(
        "a GPU provider without inferos' op",
        "the provider",
        "FP16, or WebGPU's own KV quantisation as the policy asks for it",
        "the prompt is computed again from its tokens",
    ),
    "npu": Where(
        "VitisAI and RyzenAI NPU graphs",
        "the provider, in static shapes",
        "no: scheduled and monitored only",
        "the prompt is computed again from its tokens on dml, then on cpu",
    ),
}


@dataclass(frozen=True, slots=True)
class Provider:
    """What is known of one execution provider before it is tried.

    Parameters
    ----------
    kind : str
        Its hardware where ONNX Runtime does not say: cpu, gpu or npu.
    hosts_op : bool
        Whether a graph with inferos' op runs on it, the op itself on the CPU.
    options : mapping
        Provider options of a session on it where ONNX Runtime does not name its device.
    kv_bits_option : str or None
        Its option for quantising its own KV cache to 8 or 4 bits.
    mem_pattern : bool
        Whether ONNX Runtime may plan memory ahead with it.
    local : bool
        Whether it computes on this machine.
    """

    kind: Kind
    hosts_op: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    kv_bits_option: str | None = None
    mem_pattern: bool = True
    local: bool = True

    def case(self, kind: Kind) -> Case:
        """The row of `WHERE` for it on hardware of a kind."""
        if not self.hosts_op:
            return "npu" if kind == "npu" else "gpu_without_op"
        return "cpu" if kind == "cpu" else "gpu"


# Those of one kind in the order in which they are taken where several are here.
PROVIDERS: Mapping[str, Provider] = {
    "CPUExecutionProvider": Provider("cpu"),
    "DmlExecutionProvider": Provider("gpu", mem_pattern=False),
    "MIGraphXExecutionProvider": Provider("gpu"),
    "NvTensorRTRTXExecutionProvider": Provider("gpu"),
    "CUDAExecutionProvider": Provider("gpu"),
    "ROCMExecutionProvider": Provider("gpu"),
    "WebGpuExecutionProvider": Provider("gpu", kv_bits_option="kvCacheQuantizationBits"),
    "CoreMLExecutionProvider": Provider("gpu"),
    "OpenVINOExecutionProvider": Provider("cpu", options={"device_type": "CPU"}),
    "VitisAIExecutionProvider": Provider("npu", hosts_op=False),
    "RyzenAIExecutionProvider": Provider("npu", hosts_op=False),
    "QNNExecutionProvider": Provider("npu", hosts_op=False),
    "AzureExecutionProvider": Provider("cpu", local=False),
}


def describe_provider(ep_name: str) -> Provider:
    """What is known of a provider; one nobody has heard of counts as a GPU provider that may host the op."""
    return PROVIDERS.get(ep_name, Provider("gpu"))
