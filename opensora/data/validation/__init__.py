"""Checks of what a data step wrote, and of a list of videos before it is fetched."""
