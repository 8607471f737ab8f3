"""The conformance suite, the reference engine it is proved on, and the generated models it needs."""
