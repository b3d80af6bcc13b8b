"""The authors' own modules and checkpoints, imported."""
