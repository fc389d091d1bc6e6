"""Predictions to numbers, intervals, calibration and a report: numpy and tables only, no torch."""
