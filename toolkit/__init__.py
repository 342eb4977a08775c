"""Maltu: make a small language model talk the way its user wants."""
