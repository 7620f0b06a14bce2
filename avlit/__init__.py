"""The core of avlit: configuration, contracts, objectives, models and commands; it knows no recipe by name."""

__version__ = "0.1.0"
