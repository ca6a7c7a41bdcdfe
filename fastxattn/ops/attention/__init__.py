"""Cross-attention over variable-length token sets."""
