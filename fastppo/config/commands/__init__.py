"""The settings of each command that starts a run, as one class each."""
