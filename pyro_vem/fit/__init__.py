"""The driver, its steps and its result."""
