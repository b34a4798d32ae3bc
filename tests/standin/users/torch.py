"""Hosts that `tests.processes` starts run as they do for users, who have no torch."""

raise ModuleNotFoundError("No module named 'torch'", name='torch')
