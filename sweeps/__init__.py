"""Sweeps: one file each, with `get_config(arg)` and `sweep(config)`."""
