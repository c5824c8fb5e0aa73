"""The kernels' benchmarks: every op at every shape, dtype, pass and provider; and the tables of errors and overhead."""
