"""Learned roundings by name. A new one is a file beside adaround.py and a row here."""

from quiesce.quant.rounding.adaround import AdaRound

ROUNDINGS = {"adaround": AdaRound}
"""Classes with ``forward() -> soft weight``, ``regularizer(beta)`` and ``harden() -> integers``."""
