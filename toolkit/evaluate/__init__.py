"""How good is it, before and after."""
