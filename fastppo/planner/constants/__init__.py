"""What a machine computes, moves and waits in a second: from a file, from datasheets, or measured here."""
