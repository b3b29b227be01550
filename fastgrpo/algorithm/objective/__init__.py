"""What an algorithm learns from, its signal, and the loss that it makes of it: a file a loss, and a contract a signal.

``steps.py``: stochastic steps that were stored with their log_prob.  ``images.py``: final latents, noised again.
"""
