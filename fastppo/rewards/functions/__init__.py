"""Python functions of the user as sources of reward."""
