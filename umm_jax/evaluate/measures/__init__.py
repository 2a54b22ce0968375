"""Formulas of benchmarks, one idea a file: numbers in, numbers out, each with its source."""
