"""Environments: harnesses that turn assistant messages into observations and rewards."""
