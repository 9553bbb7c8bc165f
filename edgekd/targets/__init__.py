"""Device families: their INT8 dialect and how the runner serves them."""
