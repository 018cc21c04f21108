"""The version, as a plain literal: the build reads it without importing the package, and a clone that is not installed
has it too."""

__version__ = "0.1.0"
