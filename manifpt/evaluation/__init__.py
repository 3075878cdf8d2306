"""Judging attributors fairly: artifacts, controls and baselines on the same images, splits and budgets."""
