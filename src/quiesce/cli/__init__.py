"""The command line: ``commands`` holds the entry point, ``main``."""
