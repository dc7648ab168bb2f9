"""Home of the numba.cuda port of `tbq`'s kernels. It holds no kernels yet."""
