"""The executor for CPUs: the device functions of the rules, compiled by numba into one loop over memory."""
