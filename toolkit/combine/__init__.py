"""Several adapters as one: merged, mixed, voting; what is fitted comes in as an argument, and nothing learns here."""
