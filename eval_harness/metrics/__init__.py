"""One file per metric family; pure functions that import nothing of ours."""
