"""Trained models in the formats of other programs; each export is held against the predictor before it is written."""
