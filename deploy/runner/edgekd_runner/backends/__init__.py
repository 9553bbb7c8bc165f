"""The runtimes: each opens a model file, runs it, and reads back the settings that were in force."""
