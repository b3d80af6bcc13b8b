"""Hyper-connections as a method of PEFT."""

# In front of every module here: by the end of its import the method is made known to it, by modules that import others.
import peft  # noqa: F401
