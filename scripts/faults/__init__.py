"""Faults to plant, by the part that they are planted in; `scripts/mutants.py` plants them."""
