"""Measurements, side by side in one run. README.md here says what they are."""
