"""Figures of merit of generated video: pure functions from frames to numbers."""
