"""Checks that a user runs before spending a cluster on a config."""
