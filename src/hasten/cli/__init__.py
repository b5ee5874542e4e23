"""The commands. Thin: each parses its arguments and calls one function of a lower room."""
