"""The tests, by kind: unit, contract, parity, distributed, e2e; `python -m tests.bench` measures."""
