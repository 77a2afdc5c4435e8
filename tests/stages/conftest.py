"""Fixtures of stages that run in the tests' own process."""

from support.adapted import models, own_code, run, trained  # noqa: F401
