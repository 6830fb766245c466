"""Trained models for the clients that people run."""
