"""Choose which layers stay float."""
