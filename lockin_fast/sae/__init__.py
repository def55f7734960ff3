"""Sparse autoencoders: one container, one small reader per checkpoint format, one writer."""

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.load import load_sae
from lockin_fast.sae.write import save_saelens

__all__ = ["SparseAutoencoder", "load_sae", "save_saelens"]
