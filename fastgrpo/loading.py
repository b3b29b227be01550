"""One thread at a time loads a model.

While diffusers or transformers reads one, they patch torch for the whole process: a module that another thread makes
meanwhile has no weights.  The default dtype becomes the model's too, and against that no lock of ours helps.
"""

from threading import RLock

one_at_a_time = RLock()
