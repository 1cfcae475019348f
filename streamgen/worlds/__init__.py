"""Procedural video worlds: a renderer, a caption grammar, and a checker that reads the truth back."""
