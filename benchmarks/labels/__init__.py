"""The label factory against worlds whose truth is known: votes, error, bound, coverage."""
