"""One thread at a time loads a model.

While diffusers or transformers reads one, they patch torch for the whole process: a module that another thread makes
meanwhile has no weights, and tensors there get the model's dtype unless they are given one.
"""

from threading import RLock

one_at_a_time = RLock()
