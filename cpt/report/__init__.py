"""What a person reads of a run, made from its files only."""
