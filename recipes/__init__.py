"""Recipes: thin runnable modules and their YAML, meant to be copied and edited."""
