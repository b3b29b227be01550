"""How the embedded model was made; ``__main__.py`` is the recipe."""
