"""The attention settings of a layer."""

from __future__ import annotations


class AttentionSpec:
    """The attention settings of a layer.

    Attributes:
        scale: the factor of the scores ``q k^T``.
        window: the number of tokens that a token sees, itself included, or None if the layer has no sliding window.
        softcap: the layer replaces a score s by ``softcap * tanh(s / softcap)``, or None if it does not.
    """

    __slots__ = ("scale", "softcap", "window")

    def __init__(self, scale: float, window: int | None, softcap: float | None) -> None:
        self.scale, self.window, self.softcap = scale, window, softcap
