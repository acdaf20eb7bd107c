"""Which fields and defaults: model configurations and the optimization profile."""
