"""Code of the user's own, named by its dotted path: how it is found, and which config may bring it along."""
