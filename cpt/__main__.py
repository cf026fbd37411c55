"""`python -m cpt`, which launchers start: torchrun --nproc_per_node 2 -m cpt run STREAM."""

from cpt.cli import main

if __name__ == "__main__":
    main()
