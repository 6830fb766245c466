"""Launchers: how a plan is carried out. The unit is always one run directory."""
