"""
Quantisers, conversions and the rotation of every ISA; "" names the active one.
"""
from __future__ import annotations
import numpy
import numpy.typing
import typing
__all__: list[str] = ['Attend', 'ReadBuffer', 'active_isa', 'attend_runnable', 'dequantize_k4', 'dequantize_k8', 'dequantize_v4', 'dequantize_v8', 'f16_to_f32', 'f32_to_f16', 'importance_fold', 'importance_heaviest', 'logits_at_least', 'logits_largest', 'logits_weigh', 'pack_block', 'quantize_k4', 'quantize_k8', 'quantize_v4', 'quantize_v8', 'rotate', 'runnable_isas', 'unpack_block']
class Attend:
    """
    Attention kernels of one ISA; csrc/kernels/attend.hpp fixes what they compute.
    """
    def decode(self, q: numpy.typing.NDArray[numpy.float32], format: typing.SupportsInt | typing.SupportsIndex, blocks: list[tuple[numpy.typing.NDArray[numpy.uint8], int, int, int, int]], visible: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], scale: typing.SupportsFloat | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, o: numpy.typing.NDArray[numpy.float32], m: numpy.typing.NDArray[numpy.float32], l: numpy.typing.NDArray[numpy.float32], logits: numpy.typing.NDArray[numpy.float32] | None = None, skip_below: typing.SupportsFloat | typing.SupportsIndex = 0.0, seen_p: numpy.typing.NDArray[numpy.uint16] | None = None, seen_m: numpy.typing.NDArray[numpy.float32] | None = None) -> None:
        """
        One query token over blocks of one format; o, m and l are read and updated.
        """
    def expand(self, format: typing.SupportsInt | typing.SupportsIndex, block: tuple[numpy.typing.NDArray[numpy.uint8], int, int, int, int], head_dim: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]:
        """
        One block as f32 tiles: k (head_dim, 64), v (64, head_dim).
        """
    def mass(self, seen_p: numpy.typing.NDArray[numpy.uint16], seen_m: numpy.typing.NDArray[numpy.float32], top: numpy.typing.NDArray[numpy.float32], weight: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
        """
        (group, 64) bits of fp16 and (group,) -> (64,): the sum over the group of weight * exp(seen_m - top) * p.
        """
    def prefill(self, q: numpy.typing.NDArray[numpy.float32], k: numpy.typing.NDArray[numpy.float32], v: numpy.typing.NDArray[numpy.float32], start: typing.SupportsInt | typing.SupportsIndex, begin: typing.SupportsInt | typing.SupportsIndex, end: typing.SupportsInt | typing.SupportsIndex, visible: numpy.typing.NDArray[numpy.int32], scale: typing.SupportsFloat | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, o: numpy.typing.NDArray[numpy.float32], m: numpy.typing.NDArray[numpy.float32], l: numpy.typing.NDArray[numpy.float32]) -> None:
        """
        Many query rows over one expanded block; o, m and l are read and updated.
        """
    @property
    def isa(self) -> str:
        ...
class ReadBuffer:
    """
    Memory to read, in huge pages where the system gives them.
    """
    def __init__(self, bytes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def read(self, offset: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex, isa: str = '') -> int:
        """
        Reads every byte once; the exclusive or of its words of 64 bits.
        """
    @property
    def huge(self) -> bool:
        ...
    @property
    def size(self) -> int:
        ...
def active_isa() -> str:
    """
    The ISA in use
    """
def attend_runnable() -> list:
    """
    Attention kernels this CPU can run, scalar first.
    """
def dequantize_k4(codes: numpy.typing.NDArray[numpy.uint8], scales: numpy.ndarray, minima: numpy.ndarray | None, out: numpy.ndarray, isa: str = '') -> None:
    """
    codes, float16 scales and minima -> (..., tokens, head_dim)
    """
def dequantize_k8(codes: numpy.typing.NDArray[numpy.uint8], scales: numpy.ndarray, minima: numpy.ndarray | None, out: numpy.ndarray, isa: str = '') -> None:
    """
    codes, float16 scales and minima -> (..., tokens, head_dim)
    """
def dequantize_v4(codes: numpy.typing.NDArray[numpy.uint8], scales: numpy.ndarray, minima: numpy.ndarray | None, out: numpy.ndarray, isa: str = '') -> None:
    """
    codes, float16 scales and minima -> (..., tokens, head_dim)
    """
def dequantize_v8(codes: numpy.typing.NDArray[numpy.int8], scales: numpy.ndarray, minima: numpy.ndarray | None, out: numpy.ndarray, isa: str = '') -> None:
    """
    codes, float16 scales and minima -> (..., tokens, head_dim)
    """
def f16_to_f32(x: numpy.typing.NDArray[numpy.uint16], out: numpy.typing.NDArray[numpy.float32], isa: str = '') -> None:
    """
    fp16 bits in uint16 -> float32
    """
def f32_to_f16(x: numpy.typing.NDArray[numpy.float32], out: numpy.typing.NDArray[numpy.uint16], saturate: bool = False, isa: str = '') -> None:
    """
    float32 -> fp16 bits in uint16, nearest even
    """
def importance_fold(average: numpy.ndarray, mass: numpy.typing.NDArray[numpy.float32], keep: typing.SupportsFloat | typing.SupportsIndex, add: typing.SupportsFloat | typing.SupportsIndex, isa: str = '') -> None:
    """
    average (tokens,) float16 in place: average * keep + mass * add where that is positive
    """
def importance_heaviest(average: numpy.ndarray, norm: numpy.ndarray, isa: str = '') -> float:
    """
    The sum of the 8 largest products
    """
def logits_at_least(x: numpy.typing.NDArray[numpy.float32], threshold: typing.SupportsFloat | typing.SupportsIndex, isa: str = '') -> numpy.typing.NDArray[numpy.int32]:
    """
    Positions of the finite logits that reach the threshold
    """
def logits_largest(x: numpy.typing.NDArray[numpy.float32], isa: str = '') -> tuple:
    """
    The largest finite logit, and that of each chunk of 512
    """
def logits_weigh(x: numpy.typing.NDArray[numpy.float32], top: typing.SupportsFloat | typing.SupportsIndex, inverse_temperature: typing.SupportsFloat | typing.SupportsIndex, isa: str = '') -> tuple:
    """
    The sum of exp((x - top) * inverse_temperature), and that of each chunk of 512
    """
def pack_block(format: str, k: numpy.typing.NDArray[numpy.float32], v: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.uint8]:
    """
    (tokens, head_dim) float32 keys and values -> the bytes of one block
    """
def quantize_k4(x: numpy.ndarray, codes: numpy.typing.NDArray[numpy.uint8], scales: numpy.ndarray, minima: numpy.ndarray | None, isa: str = '') -> None:
    """
    (..., tokens, head_dim) float32 or float16 -> codes in block order, float16 scales and minima
    """
def quantize_k8(x: numpy.ndarray, codes: numpy.typing.NDArray[numpy.uint8], scales: numpy.ndarray, minima: numpy.ndarray | None, isa: str = '') -> None:
    """
    (..., tokens, head_dim) float32 or float16 -> codes in block order, float16 scales and minima
    """
def quantize_v4(x: numpy.ndarray, codes: numpy.typing.NDArray[numpy.uint8], scales: numpy.ndarray, minima: numpy.ndarray | None, isa: str = '') -> None:
    """
    (..., tokens, head_dim) float32 or float16 -> codes in block order, float16 scales and minima
    """
def quantize_v8(x: numpy.ndarray, codes: numpy.typing.NDArray[numpy.int8], scales: numpy.ndarray, minima: numpy.ndarray | None, isa: str = '') -> None:
    """
    (..., tokens, head_dim) float32 or float16 -> codes in block order, float16 scales and minima
    """
def rotate(x: numpy.typing.NDArray[numpy.float32], out: numpy.typing.NDArray[numpy.float32], isa: str = '') -> None:
    """
    (..., rows, head_dim) float32, rotated by the Hadamard transform; out may be x
    """
def runnable_isas() -> list[str]:
    """
    ISAs this CPU runs, scalar first, fastest last
    """
def unpack_block(format: str, block: numpy.typing.NDArray[numpy.uint8], head_dim: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex) -> tuple:
    """
    The bytes of one block -> (tokens, head_dim) float32 keys and values
    """
