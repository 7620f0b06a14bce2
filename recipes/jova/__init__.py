"""JoVA: twin MM-DiTs in joint self-attention, trained with a mouth-weighted loss (arXiv 2512.13677)."""
