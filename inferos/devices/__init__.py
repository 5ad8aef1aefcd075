"""Devices: what is here, what each can do, and what runs where.

Nothing is imported here: onnx and onnxruntime arrive with the part that needs them.
"""

__all__: list[str] = []
