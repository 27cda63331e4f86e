"""Guides: diagonal Gaussians on the unconstrained scale, mean-field and amortized."""
