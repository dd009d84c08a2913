"""Python functions of the user as sources of reward, and what keeps them from changing the process they run in."""
