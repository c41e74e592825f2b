"""Drafting: tokens proposed cheaply, then verified by the target many at a time."""
