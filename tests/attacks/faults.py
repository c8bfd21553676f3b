"""The faults: each as somebody's converter, loader, disk or hand has made it."""

from tests.attacks import codes, places, rounding, scales, structure
from tests.attacks.plant import EMBED, FAULTS, HEAD, NORM, Fault, Q, quantise

MODULES = (scales, codes, rounding, places, structure)
"""Each adds its faults to FAULTS when it is imported."""

__all__ = ["EMBED", "FAULTS", "HEAD", "MODULES", "NORM", "Fault", "Q", "quantise"]
