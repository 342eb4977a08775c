"""The search for good values: Optuna proposes them, fit tries them, a study remembers what came of it."""
