"""Files that are whole or not there, in directories that are nobody else's."""
