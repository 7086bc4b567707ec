"""Learned roundings by name. A new one is a file beside adaround.py and a row here."""

from quiesce.quant.rounding.adaround import AdaRound
from quiesce.quant.rounding.joint import JointRounding
from quiesce.quant.rounding.rounding import Rounding

ROUNDINGS: dict[str, type[Rounding]] = {
    "adaround": AdaRound,  # learn for each weight whether it is rounded down or up (arXiv 2004.10568)
    "joint": JointRounding,  # and the weight's step sizes (Genie-M, arXiv 2212.04780)
}
