"""Ready configurations, one YAML file each."""
