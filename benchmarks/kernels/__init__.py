"""How fast the operators of ``fastgrpo_kernels`` are, and what they compile to.

``python -m benchmarks.kernels`` times them on a GPU, ``python -m benchmarks.kernels.cubins`` needs none.
"""
