"""The nouns: what stages exchange, and the interfaces that plug-ins implement. Imports without torch."""
