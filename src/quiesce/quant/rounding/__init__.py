"""Learned roundings by name. A new one is a file beside adaround.py and a row here."""

from quiesce.quant.rounding.adaround import AdaRound
from quiesce.quant.rounding.rounding import Rounding

ROUNDINGS: dict[str, type[Rounding]] = {"adaround": AdaRound}
