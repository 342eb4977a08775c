"""Where tokens come from: one file an engine, one contract for all."""
