"""The trainer, and what its tools share."""

from library.wrong_python import explain_wrong_python

explain_wrong_python()
