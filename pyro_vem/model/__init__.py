"""The model: its roles, its data, and what runs of it tell."""
