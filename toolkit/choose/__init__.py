"""Which base to start from: each candidate learns the recipe's talk for a little while, and is measured."""
