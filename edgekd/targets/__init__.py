"""Device families: their INT8 scheme and how the runner serves them."""
