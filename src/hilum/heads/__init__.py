"""Prediction heads on a frozen backbone, and the side-by-side search over learning rates."""
