"""A checkpoint at work: zero-shot classification, picture search, heat maps, whole evaluations."""
