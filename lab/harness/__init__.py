"""Measurement: ceiling, timing, op and model benchmarks, the ledger of a token, records, compare."""
