"""Fused kernels and thin trainers for latent blocking and lock-in measurement."""
