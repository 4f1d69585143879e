"""The executor for GPUs: keeps tables on the device and calls the launches of `kernels/launch.py`."""
