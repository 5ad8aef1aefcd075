"""Other implementations, from their own packages."""

__all__: list[str] = []
