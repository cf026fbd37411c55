"""LoRA adapters: what a stage may ask for, how they are made, kept and carried from stage to stage."""
