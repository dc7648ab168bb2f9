"""Numba kernels, one module per family. Imported on first use, never by `import tbq`."""
