"""Processes: start, activity, output, hangs and end. Of the package it imports only errors and files."""
