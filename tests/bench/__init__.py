"""What cpt costs: `python -m tests.bench`. Nothing here is a test, for figures are noisy and tests are not."""
