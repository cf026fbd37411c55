"""Task families, one file each: a module with `TASKS` (name -> one line) and `rows(name, split)`."""
