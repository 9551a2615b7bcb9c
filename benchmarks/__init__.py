"""Measurements against peers and of memopt's own promises; see README.md here. Not part of the installed package."""
