"""Configs: every key with its default, and how they become a run."""
