"""Variants of the reference engine with one bug each: they show that the checks can fail, and fail for the right reason."""
