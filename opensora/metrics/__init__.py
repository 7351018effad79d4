"""Measures of generated videos; each name says what it is made of."""
