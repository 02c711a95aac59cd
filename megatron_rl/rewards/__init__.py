"""Verifiers as plain functions, and the pool of worker processes that runs them. Imports no torch."""
