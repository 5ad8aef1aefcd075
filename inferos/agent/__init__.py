"""The control agent and the inference server on 127.0.0.1:7031. The only folder that imports a web framework."""

__all__: list[str] = []
