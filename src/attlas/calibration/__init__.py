"""Calibration: what a part must know of a model before it can be attached, gathered from any text.

    attlas calibrate q-filters --model smollm2

One file a model and part, in the user's cache folder, as safetensors. The parts find it there.
"""

from attlas.calibration.parts import Calibrated, Calibrator
from attlas.calibration.run import calibrate, windows
from attlas.calibration.statistics import Calibration

__all__ = ["Calibrated", "Calibration", "Calibrator", "calibrate", "windows"]
