"""Runs a benchmark: arguments, passes over shared streams, a directory that a killed run resumes from."""
