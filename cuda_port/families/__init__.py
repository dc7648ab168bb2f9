"""The ports: per module the kernels of one family, found by the name of the family."""
