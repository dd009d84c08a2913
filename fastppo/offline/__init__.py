"""Learning from data that is given: SFT and reward modelling, on one loop."""
