"""The verbs: each stage takes artefacts and returns artefacts."""
