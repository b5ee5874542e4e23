"""PyTorch reference of every native operation: one file per kernel file, functions of the same names."""
