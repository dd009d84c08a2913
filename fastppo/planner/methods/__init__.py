"""The bytes of each kind of run by role and phase, one module for each kind."""
