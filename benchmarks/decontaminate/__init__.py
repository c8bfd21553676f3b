"""Planted variants of test questions, and what finds them."""
