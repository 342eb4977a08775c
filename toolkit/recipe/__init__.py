"""The recipe: everything a run does. Reading one imports no torch."""
