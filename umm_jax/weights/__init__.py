"""Names and layouts of PyTorch weights: one invertible table, and the rows of the stock parts."""
