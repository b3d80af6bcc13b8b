"""Hyper-connections as a method of PEFT."""
