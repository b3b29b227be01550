"""One command for a GPU that is there for minutes: ``python -m benchmarks.first_contact --minutes 12``.

steps.py is what it runs, in order of value; runner.py is how; README.md says what to carry to a bare machine.
"""
