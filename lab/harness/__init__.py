"""Measurement: what is asked for (request), timing, ceilings, ops, models, ladders, a token's ledger."""
