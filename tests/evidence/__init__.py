"""Tables of docs/evidence, one command each; resumable, because every run in them is."""
