"""Verifiers as plain functions. Imports no torch."""
