"""The seconds of a step, predicted from what a run computes and moves and from constants of the machine."""
