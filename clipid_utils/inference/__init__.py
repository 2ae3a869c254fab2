"""Using a checkpoint in Indonesian: zero-shot classification, picture search, heat maps, whole evaluations."""
