"""The executor: a Python process that runs calls one after the other. Imported by the zygote, so it imports little."""
