"""The deterministic simulator: whole clusters on greenlets, under virtual time, from one seed a life."""
