"""The commands: train, collect, report, export and benchmark."""
